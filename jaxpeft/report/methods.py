"""The methods in words: equation, source and advice of each, for model cards and the README's table.

A method describes itself (`Method.description`). This file adds the combinations that have a name, and the baselines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from jaxpeft.adapters import METHODS, Description, Method, dora
from jaxpeft.config import AdapterConfig, ContextualConfig, ModelConfig, PruningConfig
from jaxpeft.config.adapter import redraws_entries
from jaxpeft.quantization import NUMBER_FORMATS

# Combinations of LoRA, in the order of the table and behind LoRA; each with the file that holds it.
_COMBINATIONS: dict[str, tuple[Description, str]] = {
    "sparse-lora": (
        Description(
            title="Sparse LoRA",
            equation="y = xW₀ + s·x(M_A ⊙ A)(M_B ⊙ B)",
            source="He et al. 2022, arXiv 2210.04284; Zhu & Gupta 2017, arXiv 1710.01878",
            advice="to see how few entries an adapter needs; it is not faster",
            peft="`LORA`, zeros in it",
        ),
        "pruning/masks.py",
    ),
    "contextual": (
        Description(
            title="SparseLoRA",
            equation="y = xW₀[:, K] + s·xAB[:, K], K chosen for each batch; in training only",
            source="Khaki et al. 2025, arXiv 2506.16500",
            advice="if training should take less time; it is not a smaller adapter",
            peft="`LORA`",
        ),
        "contextual/layers.py",
    ),
    "qlora": (
        Description(
            title="QLoRA",
            equation="y = x·dequantise(W₀) + s·xAB",
            source="Dettmers et al. 2023, arXiv 2305.14314",
            advice="if the base does not fit into memory",
            peft="`LORA`, on a bitsandbytes base",
        ),
        "quantization/four_bit.py",
    ),
    "dora": (dora.DESCRIPTION, "adapters/dora.py"),
}
_BASELINES: dict[str, tuple[Description, str]] = {
    "full": (
        Description(
            title="Full fine-tuning",
            equation="everything trains",
            source="",
            advice="the reference, if memory allows",
            peft="a whole model",
        ),
        "runs/adapters.py",
    ),
    "head": (
        Description(
            title="Head only",
            equation="the task's head trains",
            source="",
            advice="the floor that an adapter must beat",
            peft="`LORA` without layers",
        ),
        "runs/adapters.py",
    ),
}


def descriptions() -> dict[str, tuple[Description, str]]:
    """Method, combination or baseline → its description and its file in jaxpeft, in the order of the README's table."""
    methods = {
        name: (kind.description, kind.__module__.removeprefix("jaxpeft.").replace(".", "/") + ".py")
        for name, kind in METHODS.items()
    }
    return {"lora": methods["lora"], **_COMBINATIONS, **methods, **_BASELINES}


def describe(name: str) -> Description:
    """The description of one method, combination or baseline."""
    own = {**_COMBINATIONS, **_BASELINES}
    return own[name][0] if name in own else METHODS[name].description


def in_peft(adapter: AdapterConfig) -> bool:
    """True if torch PEFT can load the files of this run's method, or transformers those of full fine-tuning."""
    return bool(describe(adapter.method).peft) and not adapter.keep_base_zeros


def method_name(
    adapter: AdapterConfig, pruning: PruningConfig, model: ModelConfig, contextual: ContextualConfig
) -> str:
    """A run's method in words: `Sparse LoRA`, `QLoRA`, `DoRA on an int8 base`, `LoRA with contextual sparsity`, …"""
    name = describe("dora" if adapter.use_dora else adapter.method).title
    name = f"{name} redrawn by {_redraw(pruning)[0]}" if redraws_entries(adapter, pruning) else name
    if model.quantization != "none":
        qlora = name == "LoRA" and model.quantization == "nf4"
        name = "QLoRA" if qlora else f"{name} on an {NUMBER_FORMATS[model.quantization].title} base"
    name = f"Sparse {name}" if pruning.sparsity else name
    return f"{name} with contextual sparsity" if contextual.is_on else name


def citations(
    adapter: AdapterConfig, pruning: PruningConfig, model: ModelConfig, contextual: ContextualConfig
) -> list[str]:
    """One line for every method in a run's combination."""
    keys: list[str] = [adapter.method]
    keys += ["dora"] if adapter.use_dora else []
    keys += ["sparse-lora"] if pruning.sparsity else []
    keys += ["contextual"] if contextual.is_on else []
    found = [describe(key) for key in keys]
    lines = [f"{description.title}: {description.source}" for description in found if description.source]
    lines += [NUMBER_FORMATS[model.quantization].citation] if model.quantization != "none" else []
    lines += [": ".join(filter(None, _redraw(pruning)))] if redraws_entries(adapter, pruning) else []
    chosen = str(adapter.init_lora_weights)
    lines += ["LoSA: Huang et al. 2025, arXiv 2502.14816"] if adapter.keep_base_zeros else []
    lines += [f"{title}: {source}" for name, (title, source) in _INITIALISATIONS.items() if chosen.startswith(name)]
    return lines


def _redraw(pruning: PruningConfig) -> tuple[str, str]:
    """Title and source of a schedule that redraws entries. One that was added has only its name."""
    known = {
        "rigl": ("RigL", "Evci et al. 2020, arXiv 1911.11134"),
        "set": ("SET", "Mocanu et al. 2018, arXiv 1707.04780"),
    }
    return known.get(pruning.schedule, (pruning.schedule, ""))


_INITIALISATIONS = {
    "pissa": ("PiSSA", "Meng et al. 2024, arXiv 2404.02948"),
    "olora": ("OLoRA", "Büyükakyüz 2024, arXiv 2406.01775"),
    "loftq": ("LoftQ", "Li et al. 2023, arXiv 2310.08659"),
    "eva": ("EVA", "Paischer et al. 2024, arXiv 2410.07170"),
    "lora_ga": ("LoRA-GA", "Wang et al. 2024, arXiv 2407.05000"),
}


def options(method: Method) -> list[tuple[str, str]]:
    """A method's options as rows `(name, value)`: rank, alpha and dropout, and every option that differs from its default."""
    rows = []
    for option in fields(method):  # type: ignore[arg-type]
        value = getattr(method, option.name)
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if option.name in ("rank", "alpha", "dropout") or value != default:
            rows.append((option.name.replace("_", " "), _show(value)))
    return rows


def methods_table(parameters: Mapping[str, int], step_times: Mapping[str, float]) -> str:
    """The Markdown table of all methods.

    Args:
        parameters: method → trained parameters in BERT-base.
        step_times: method → time of a step relative to LoRA's.
    """
    lines = [
        "| method | equation | source | parameters | step time | in PEFT | when to choose it |",
        "|---|---|---|---:|---:|---|---|",
    ]
    for key, (d, file) in descriptions().items():
        cost = f"{step_times[key]:.2f}" if key in step_times else "–"
        size = f"{parameters[key]:,}" if key in parameters else "–"
        name = f"[{d.title}](jaxpeft/{file})"
        row = (name, d.equation, d.source or "–", size, cost, d.peft or "–", d.advice)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
