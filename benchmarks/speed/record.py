"""From timings to the record: medians, rates, ratios with their spread, and the bounds. Plain values in and out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.cases import METHODS, RANK, Case
from benchmarks.speed.flops import Shape, Sizes, Trained, total_flops
from benchmarks.speed.rounds import Runner, Timing

Cell = dict[str, Any]


def cell(case: Case, method: str, timing: Timing, config: Mapping[str, Any], *, peak: float) -> Cell:
    """The figures of a runner: `peak` is the machine's matrix-product peak in operations a second."""
    seconds = [each["seconds"] / each["updates"] for each in timing.rounds]
    rows = [each["rows"] / each["seconds"] for each in timing.rounds]
    tokens = [each["tokens"] / each["seconds"] for each in timing.rounds]
    flops = statistics.mean(_flops(case, method, each, config) for each in timing.rounds)
    usual = statistics.median(each["seconds"] for each in timing.rounds)
    rate = flops / statistics.median(seconds)
    return {
        "seconds": _rounded(statistics.median(seconds)),
        "seconds_spread": [_rounded(min(seconds)), _rounded(max(seconds))],
        "rows_per_second": _rounded(statistics.median(rows)),
        "tokens_per_second": _rounded(statistics.median(tokens)),
        "updates_per_turn": timing.rounds[0]["updates"],
        "compile_seconds": _rounded(max(sum(each["seconds"] for each in timing.warm) - usual * len(timing.warm), 0.0)),
        "peak_bytes": timing.memory["device"] or timing.memory["training"],
        "peak_bytes_with_start": timing.memory["device"] or max(timing.memory["life"], timing.memory["process"]),
        "flops": _rounded(flops),
        "counted_flops": _rounded(timing.flops or 0.0),
        "flops_per_second": _rounded(rate),
        "share_of_peak": _rounded(rate / peak),
        "trainable": timing.start["trainable"],
        "first_loss": _rounded(timing.start["first_loss"]),
        "attention": timing.start.get("attention"),
    }


def row(
    case: Case,
    method: str,
    timings: Mapping[Runner, Timing],
    config: Mapping[str, Any],
    *,
    offered: Mapping[str, str],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The figures of a method from `timings`, which may hold other methods too. If LoRA is one of them, its step is compared.

    `offered` maps a variant of PEFT to the reason why it was not measured, or ""; `measured` says when and how, with the peak.
    """
    ours, lora = Runner(method), Runner("lora")
    runners = [runner for runner in timings if runner.method == method]
    found: dict[str, Any] = {
        runner.column: cell(case, method, timings[runner], config, peak=measured["peak"]) for runner in runners
    }
    found["ratios"] = {runner.column: ratio(timings[ours], timings[runner]) for runner in runners if runner.variant}
    found["empty"] = {name: missing for name, missing in offered.items() if missing}
    found["measured"] = dict(measured)
    if method != "lora" and lora in timings:
        found["step_over_lora"] = ratio(timings[lora], timings[ours])
    return found


def summary(case: str, method: str, row: Mapping[str, Any]) -> str:
    """A row in one line."""
    ratios = ", ".join(
        f"{name} {r['median']:.2f}× ({r['min']:.2f} to {r['max']:.2f})" for name, r in row["ratios"].items()
    )
    over = f", {row['step_over_lora']['median']:.2f} of LoRA's step" if "step_over_lora" in row else ""
    return f"{case} {method}: {row['ours']['seconds']:.4g} s a step{over}; faster than PEFT: {ratios or '–'}"


def best_rate(peaks: Mapping[str, Any]) -> float:
    """The best rate of matrix products that a side reached, in operations a second; `peaks` are those of a dtype."""
    return max(rate["rate"] for side in peaks.values() for rate in side)


def ratio(ours: Timing, other: Timing) -> dict[str, float]:
    """How many times more rows a second `ours` does: the median over the rounds, and their extremes."""
    rounds = [
        (a["rows"] / a["seconds"]) / (b["rows"] / b["seconds"]) for a, b in zip(ours.rounds, other.rounds, strict=True)
    ]
    return {
        "median": _rounded(statistics.median(rounds)),
        "min": _rounded(min(rounds)),
        "max": _rounded(max(rounds)),
    }


def trained(case: Case, method: str) -> Trained:
    """What trains, for the formula."""
    if method == "full":
        return Trained(everything=True)
    head = case.task == "classification" or bool(case.modules_to_save)
    return Trained(rank=RANK if method in METHODS else 0, head=head)


def _flops(case: Case, method: str, each: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    return total_flops(
        Sizes.of(config),
        [Shape(*shape) for shape in each["shapes"]],
        trained(case, method),
        steps=each["updates"],
        num_labels=2 if case.task == "classification" else 0,
    )


def _rounded(value: float) -> float:
    """Four digits: more than any timing has."""
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Bound:
    """A figure that must come out; `least` says on which side of `limit` it is met.

    `key` leads to the figure in the record: the names of its dictionaries.
    """

    what: str
    key: tuple[str, ...]
    limit: float
    least: bool

    def value(self, record: Mapping[str, Any]) -> float | None:
        """The figure, or None if it was not measured."""
        found: Any = record
        for name in self.key:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def met(self, value: float) -> bool:
        """Whether `value` is within the bound."""
        return value >= self.limit if self.least else value <= self.limit


def _against(case: str, variant: str, limit: float, what: str) -> Bound:
    return Bound(what, ("cases", case, "lora", "ratios", variant, "median"), limit, True)


BOUNDS = (
    _against("distilbert-mlm", "eager", 1.75, "DistilBERT masked-LM, LoRA, against PEFT eager"),
    _against("distilbert-mlm", "eager-masked", 1.05, "the same, PEFT with logits of the masked tokens only"),
    _against("sst2-lengths", "eager", 1.5, "classification of real lengths, LoRA, against PEFT with dynamic padding"),
    *(
        Bound(f"step time of {method} over LoRA's", ("cases", "distilbert-mlm", method, "step_over_lora", "median"), limit, False)
        for method, limit in (("sparse-lora", 1.05), ("qlora", 1.25), ("dora", 1.2), ("hira", 1.4))
    ),
    Bound("seconds from `python train.py` to the first step, warm compilation cache",
          ("startup", "warm_seconds"), 12.0, False),
    _against("bert-base-gpu", "compile", 1.3, "BERT-base 256 × 128 in bf16, LoRA, against compiled PEFT"),
    Bound("share of the matrix-product peak there", ("cases", "bert-base-gpu", "lora", "ours", "share_of_peak"), 0.45, True),
    _against("minilm-gpu", "eager", 5.0, "MiniLM 16 × 128 in bf16, LoRA, against PEFT eager"),
)  # fmt: skip


def check(record: Mapping[str, Any], bounds: Sequence[Bound] = BOUNDS) -> list[dict[str, Any]]:
    """Every bound whose figure was measured, with the figure and whether it is met."""
    measured = [(bound, bound.value(record)) for bound in bounds]
    return [
        {"what": bound.what, "value": value, "limit": bound.limit, "least": bound.least, "met": bound.met(value)}
        for bound, value in measured
        if value is not None
    ]
