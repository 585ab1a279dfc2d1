"""The steps, the most worthwhile first. Plain values: nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.speed.cases import CASES, METHODS, Case


@dataclass(frozen=True)
class Step:
    """One measurement in a process of its own.

    Attributes:
        name: what `--steps` calls it.
        kind: the function of `benchmarks.gpu.work` that does it.
        seconds: it is stopped after so many. It does not start if less than half of them are left.
        case: of a kind "speed".
        methods: the methods that it compares, or checks.
        variants: the ways in which torch PEFT is measured.
        needs: a step without which it cannot be done.
    """

    name: str
    kind: str
    seconds: int
    case: str = ""
    methods: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    needs: str = ""


def _speed(name: str, seconds: int, case: str, *methods: str, variants: tuple[str, ...] = ("eager",)) -> Step:
    return Step(name, "speed", seconds, case, methods, variants, needs="peaks")


_BOTH = ("eager", "compile")
_FIRST = ("lora", "qlora", "int8", "hira", "sparse-lora", "dora", "full")

STEPS: tuple[Step, ...] = (
    Step("peaks", "peaks", 60),
    _speed("bert-base-128", 150, "bert-base-gpu", "lora", variants=_BOTH),
    _speed("bert-base-128-stored", 120, "bert-base-gpu", "qlora", "sparse-lora"),
    Step("correctness", "correctness", 90, methods=_FIRST),
    Step("together", "together", 90),
    _speed("bert-base-128-others", 120, "bert-base-gpu", "hira", "full"),
    _speed("minilm", 120, "minilm-gpu", "lora", variants=_BOTH),
    _speed("packed", 120, "sst2-packed-gpu", "lora", variants=("eager", "varlen")),
    _speed("bert-base-512", 150, "bert-base-512-gpu", "lora", variants=_BOTH),
    Step("correctness-others", "correctness", 150, methods=tuple(name for name in METHODS if name not in _FIRST)),
    Step("tests", "tests", 150),
    _speed("bert-base-512-stored", 120, "bert-base-512-gpu", "qlora", "sparse-lora"),
    _speed("bert-base-512-others", 120, "bert-base-512-gpu", "hira", "full"),
)

TESTS = (
    "adapters/test_ladder.py",
    "adapters/test_side_paths.py",
    "quantization/test_four_bit.py",
    "quantization/test_int8.py",
)
"""The chex tests of the adapters' mathematics and of number formats, under tests/."""

_TINY_BERT: Mapping[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 30522,  # MiniLM's tokenizer
}


def case_of(step: Step, *, tiny: bool) -> Case:
    """The case of a step of kind "speed"; `tiny` shrinks it to what a CPU does in seconds, with dense attention."""
    case = CASES[step.case]
    if not tiny:
        return case
    own = {} if isinstance(case.model, str) else case.model
    return replace(
        case,
        model={**own, **_TINY_BERT},
        rows=4,
        length=32,
        steps_per_round=2 if case.steps_per_round else 0,
        data_rows=8 if case.data_rows else 0,
        attention="auto",
    )


def checked_case(dtype: str) -> Case:
    """The work on which one training step on the device is compared with the CPU's: a tiny BERT without dropout, in `dtype`."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = {**_TINY_BERT, **still, "hidden_size": 128, "intermediate_size": 256}
    title = "a step on the device and on the CPU"
    return Case("correctness", title, model, "masked-lm", 4, 32, 1, (), dtype=dtype, attention="dense")
