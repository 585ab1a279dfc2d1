"""The methods for whoever chooses one: equation, source and advice of each, for model cards and the README's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from jaxpeft.adapters import Method
from jaxpeft.config import RunConfig
from jaxpeft.quantization import NUMBER_FORMATS


@dataclass(frozen=True)
class Description:
    """What a reader should know of a method before reading its file.

    `file` is the module of jaxpeft that holds it; `peft` what carries it to torch PEFT; `advice` one line on when to choose it.
    """

    title: str
    equation: str
    source: str
    file: str
    peft: str
    advice: str


DESCRIPTIONS: dict[str, Description] = {
    "lora": Description(
        "LoRA",
        "y = xW₀ + s·xAB, s = α/r",
        "Hu et al. 2021, arXiv 2106.09685",
        "adapters/lora.py",
        "`LORA`",
        "the default",
    ),
    "sparse-lora": Description(
        "Sparse LoRA",
        "y = xW₀ + s·x(M_A ⊙ A)(M_B ⊙ B)",
        "He et al. 2022, arXiv 2210.04284; Zhu & Gupta 2017, arXiv 1710.01878",
        "pruning/masks.py",
        "`LORA`, zeros in it",
        "to see how few entries an adapter needs; it is not faster",
    ),
    "qlora": Description(
        "QLoRA",
        "y = x·dequantise(W₀) + s·xAB",
        "Dettmers et al. 2023, arXiv 2305.14314",
        "quant/four_bit.py",
        "`LORA`, on a bitsandbytes base",
        "when the base does not fit",
    ),
    "dora": Description(
        "DoRA",
        "W = m ⊙ (W₀ + s·AB) / ‖W₀ + s·AB‖",
        "Liu et al. 2024, arXiv 2402.09353",
        "adapters/dora.py",
        "`LORA`, `use_dora`",
        "LoRA at a low rank falls short, and a slower step is fine",
    ),
    "hira": Description(
        "HiRA",
        "W = W₀ + W₀ ⊙ AB",
        "Huang et al., ICLR 2025",
        "adapters/hira.py",
        "`HIRA`",
        "an update of high rank; wants a rate several times LoRA's",
    ),
    "loha": Description(
        "LoHa",
        "W = W₀ + s·(A₁B₁) ⊙ (A₂B₂)",
        "Hyeon-Woo et al. 2021, arXiv 2108.06098",
        "adapters/loha.py",
        "`LOHA`",
        "rank r² for the parameters of rank 2r",
    ),
    "lokr": Description(
        "LoKr",
        "W = W₀ + s·C ⊗ (AB)",
        "Yeh et al. 2023, arXiv 2309.14859",
        "adapters/lokr.py",
        "`LOKR`",
        "the smallest file of those with matrices",
    ),
    "vera": Description(
        "VeRA",
        "y = xW₀ + (d ⊙ xA)B ⊙ b, A and B frozen and shared",
        "Kopiczko et al. 2023, arXiv 2310.11454",
        "adapters/vera.py",
        "`VERA`, with its projections",
        "many adapters to keep: vectors alone train",
    ),
    "adalora": Description(
        "AdaLoRA",
        "W = W₀ + s·PΛQ, entries of Λ pruned to a budget",
        "Zhang et al. 2023, arXiv 2303.10512",
        "adapters/adalora.py",
        "`ADALORA`",
        "long runs that should find each layer's rank",
    ),
    "ia3": Description(
        "IA³",
        "y = l ⊙ (xW₀ + bias), or (l ⊙ x)W₀ + bias",
        "Liu et al. 2022, arXiv 2205.05638",
        "adapters/ia3.py",
        "`IA3`",
        "few examples, and next to no parameters",
    ),
    "bitfit": Description(
        "BitFit",
        "the biases train",
        "Ben Zaken et al. 2021, arXiv 2106.10199",
        "adapters/bitfit.py",
        "`LORA` without layers, `bias=all`",
        "a baseline that costs nothing at inference",
    ),
    "ln-tuning": Description(
        "LN tuning",
        "the layer norms' scales and biases train",
        "Zhao et al. 2023, arXiv 2312.11420",
        "adapters/ln_tuning.py",
        "`LN_TUNING`",
        "a baseline; often enough to move to a new domain",
    ),
    "prompt-tuning": Description(
        "Prompt tuning",
        "n trained embeddings in front of every row",
        "Lester et al. 2021, arXiv 2104.08691",
        "adapters/prompt_tuning.py",
        "`PROMPT_TUNING`",
        "one frozen model that serves many tasks in a batch",
    ),
    "full": Description(
        "Full fine-tuning", "everything trains", "", "prepare.py", "a whole model", "the reference, where memory allows"
    ),
    "head": Description(
        "Head only",
        "the task's head trains",
        "",
        "prepare.py",
        "`LORA` without layers",
        "the floor that an adapter must beat",
    ),
}
"""Name of a method, or of a combination that has one → what to say of it; in the order of the README's table."""


def method_name(config: RunConfig) -> str:
    """A run's method in words: `Sparse LoRA`, `QLoRA`, `DoRA on an int8 base`, …"""
    name = DESCRIPTIONS["dora" if config.adapter.use_dora else config.adapter.method].title
    if config.model.quantization != "none":
        qlora = name == "LoRA" and config.model.quantization == "nf4"
        name = "QLoRA" if qlora else f"{name} on an {NUMBER_FORMATS[config.model.quantization].title} base"
    return f"Sparse {name}" if config.pruning.sparsity else name


def citations(config: RunConfig) -> list[str]:
    """One line for every method that a run combines."""
    keys: list[str] = [config.adapter.method]
    keys += ["dora"] if config.adapter.use_dora else []
    keys += ["sparse-lora"] if config.pruning.sparsity else []
    lines = [f"{DESCRIPTIONS[key].title}: {DESCRIPTIONS[key].source}" for key in keys if DESCRIPTIONS[key].source]
    lines += [NUMBER_FORMATS[config.model.quantization].citation] if config.model.quantization != "none" else []
    start = config.adapter.init_lora_weights
    lines += [f"{title}: {source}" for name, (title, source) in _STARTS.items() if str(start).startswith(name)]
    return lines


_STARTS = {
    "pissa": ("PiSSA", "Meng et al. 2024, arXiv 2404.02948"),
    "olora": ("OLoRA", "Büyükakyüz 2024, arXiv 2406.01775"),
    "loftq": ("LoftQ", "Li et al. 2023, arXiv 2310.08659"),
    "eva": ("EVA", "Paischer et al. 2024, arXiv 2410.07170"),
    "lora_ga": ("LoRA-GA", "Wang et al. 2024, arXiv 2407.05000"),
}


def options(method: Method) -> list[tuple[str, str]]:
    """A method's options as rows `(name, value)`: rank, alpha and dropout, and what was set otherwise than by default."""
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
    for key, d in DESCRIPTIONS.items():
        cost = f"{step_times[key]:.2f}" if key in step_times else "–"
        size = f"{parameters[key]:,}" if key in parameters else "–"
        name = f"[{d.title}](jaxpeft/{d.file})"
        lines.append(f"| {name} | {d.equation} | {d.source or '–'} | {size} | {cost} | {d.peft} | {d.advice} |")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
