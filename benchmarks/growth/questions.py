"""The questions, and the points that answer each. Plain values: nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
TINY = {**MINILM, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@dataclass(frozen=True)
class Work:
    """The work of a training step: masked-LM with LoRA on query and value.

    Attributes:
        rows: rows of a batch.
        length: tokens of a row.
        layers: layers of the encoder.
        rank: rank of the adapters.
        adapted: the layers that are adapted; None means all.
        one_pass: True if the whole batch is computed in one pass; else the run decides (`training.micro_batch_size auto`).
        model: the encoder's config, but for its number of layers.
    """

    rows: int = 16
    length: int = 128
    layers: int = 6
    rank: int = 8
    adapted: tuple[int, ...] | None = None
    one_pass: bool = False
    model: str = "minilm"

    @property
    def key(self) -> str:
        """The name of the work in the record. Points of several questions may have the same."""
        adapted = "all" if self.adapted is None else ",".join(map(str, self.adapted))
        passes = ", one pass" if self.one_pass else ""
        return (
            f"{self.model} of {self.layers} layers, {self.rows} x {self.length}, rank {self.rank} in {adapted}{passes}"
        )

    @property
    def config(self) -> dict[str, Any]:
        """The encoder's config, as transformers has it."""
        return {**(TINY if self.model == "tiny" else MINILM), "num_hidden_layers": self.layers}

    @property
    def steps_per_round(self) -> int:
        """Steps in a timed round: about 8,192 tokens, from 2 to 16 steps."""
        return max(2, min(16, 8192 // (self.rows * self.length)))


@dataclass(frozen=True)
class Start:
    """The start of a run on files.

    Attributes:
        task: "masked-lm", on a text, or "classification", on rows with labels.
        size: bytes of the text, or number of rows.
        again: True for the second start of the same run, which finds the tokens of the first.
    """

    task: str
    size: int
    again: bool = False

    @property
    def key(self) -> str:
        """The name of the start in the record."""
        return f"{self.task}, {self.size}, {'second' if self.again else 'first'} start"


Point = Work | Start

_STARTS = (
    "The first start writes the token cache, and compiles the training program, in which the size of the data stands. The second one "
    "reads both."
)


@dataclass(frozen=True)
class Question:
    """One chart and one table.

    Attributes:
        title: the question.
        x: what grows, in words.
        lines: name → (x, point), in the order of x. A line without a name is the only one.
        log: True if the axis of x is logarithmic.
        note: how to read it, one or two sentences.
    """

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, Point]]]
    log: bool = False
    note: str = ""

    @property
    def points(self) -> list[Point]:
        """All points of all lines."""
        return [point for line in self.lines.values() for _, point in line]


def questions(*, tiny: bool = False) -> dict[str, Question]:
    """Name → question. With `tiny`, all sizes are so small that a test can measure them."""
    base = Work(rows=4, length=16, layers=2, rank=2, model="tiny") if tiny else Work()
    rows, lengths = ((2, 4), (8, 16)) if tiny else ((4, 8, 16, 32, 64, 128), (64, 128, 256, 512))
    layers, ranks = ((1, 2), (1, 2)) if tiny else ((1, 2, 4, 6, 12), (1, 4, 8, 16, 64, 256))
    whole, upper, lower = ((4,), (1,), (1,)) if tiny else ((32, 64, 128), (1, 2, 4), (1, 3, 5))
    all_layers = tuple(range(base.layers))

    def changed(**values: Any) -> Work:
        return Work(**{**vars(base), **values})

    return {
        "rows": Question(
            "How does a step grow with the rows of a batch?",
            "rows of a batch",
            {
                "passes as the run decides": [(n, changed(rows=n)) for n in rows],
                "one pass": [(n, changed(rows=n, one_pass=True)) for n in whole],
            },
            note="By itself a run divides a batch into passes of fewer rows if that is faster, so its memory stops growing.",
        ),
        "length": Question(
            "How does a step grow with the length of rows?",
            "tokens of a row",
            {"": [(n, changed(length=n)) for n in lengths]},
        ),
        "layers": Question(
            "How does a step grow with the layers of the encoder?",
            "layers, all adapted",
            {"": [(n, changed(layers=n)) for n in layers]},
        ),
        "rank": Question(
            "How does a step grow with the rank?",
            "rank (log scale)",
            {"": [(n, changed(rank=n)) for n in ranks]},
            log=True,
        ),
        "adapted": Question(
            "How does a step grow with the number of adapted layers?",
            f"adapted layers, of {base.layers}",
            {
                "the upper ones": [(n, changed(adapted=all_layers[-n:])) for n in upper] + [(base.layers, base)],
                "the lower ones": [(n, changed(adapted=all_layers[:n])) for n in lower],
            },
            note="No gradient is needed below the lowest adapted layer, so adapters in the upper layers save most of the backward pass.",
        ),
        "text": Question(
            "How does the start grow with the training text?",
            "training text, MB (log scale)",
            _starts("masked-lm", (20_000, 40_000) if tiny else (5_000_000, 50_000_000, 500_000_000), unit=1e6),
            log=True,
            note=_STARTS,
        ),
        "classification": Question(
            "How does the start grow with the rows of a classification?",
            "training rows (log scale)",
            _starts("classification", (100, 200) if tiny else (10_000, 100_000, 1_000_000)),
            log=True,
            note=_STARTS,
        ),
    }


def _starts(task: str, sizes: Sequence[int], *, unit: float = 1) -> dict[str, list[tuple[float, Point]]]:
    return {
        name: [(size / unit, Start(task, size, again)) for size in sizes]
        for name, again in (("first start", False), ("second start", True))
    }
