"""The record in Markdown: a table for each question, and the bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.growth.questions import Question, Start

Record = Mapping[str, Any]

BOUND_BYTES = 1.5e9
"""How much more memory a run on the largest text may need than one on the smallest."""


def report(record: Record, questions: Mapping[str, Question]) -> str:
    """All tables. Points that are not measured are left out, and so is a question without any."""
    m, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    parts = [
        "# How cost grows",
        "",
        f"`python -m benchmarks.growth`: {m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}, Python {m['python']}; "
        f"{packages}. Measured {_when(record)}.",
        "",
        "Steps: an encoder of MiniLM's size with random weights, masked-LM, LoRA on query and value; if not said otherwise 16 rows of "
        "128 tokens, 6 layers, rank 8 in all of them. Seconds are medians of the rounds, and memory is the process's peak while it "
        "trains. Starts: `python train.py` with MiniLM, up to its first step; memory is the peak until step "
        "6, with the initial validation on one batch. It counts pages of mapped files too, which the system can take back.",
    ]
    for name, question in questions.items():
        measured = [
            (line, x, record["points"][point.key])
            for line, points in question.lines.items()
            for x, point in points
            if point.key in record["points"]
        ]
        if measured:
            is_start = isinstance(question.points[0], Start)
            parts += ["", f"## {question.title}", "", *([question.note, ""] if question.note else [])]
            parts += [f"![{question.title}](pictures/{name}.svg)", ""]
            parts += _starts(question, measured) if is_start else _steps(question, measured)
    if (found := bound(record, questions)) is not None:
        sign = "met" if found <= BOUND_BYTES else "MISSED"
        parts += [
            "",
            f"From the smallest to the largest text {found / 1e9:.2f} GB more; the bound is {BOUND_BYTES / 1e9:g} GB: {sign}.",
        ]
    return "\n".join(parts) + "\n"


def bound(record: Record, questions: Mapping[str, Question]) -> float | None:
    """Bytes that the largest text needs more than the smallest, in the worse of the two starts. None if either is not measured."""
    growths = []
    for line in questions["text"].lines.values():
        ends = [record["points"].get(point.key) for _, point in (line[0], line[-1])]
        if all(ends):
            growths.append(ends[1]["peak_bytes"] - ends[0]["peak_bytes"])
    return max(growths, default=None)


def _steps(question: Question, measured: list[tuple[str, float, Any]]) -> list[str]:
    lines = [
        f"| {_plain(question.x)} | | seconds a step | spread | peak memory, GB | rows of a pass | trained parameters |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for line, x, each in measured:
        low, high = each["seconds_spread"]
        lines.append(
            f"| {x:,g} | {line} | {each['seconds']:.3g} | {low:.3g} to {high:.3g} | {each['peak_bytes'] / 1e9:.2f} "
            f"| {each['rows_per_pass']} | {each['trained']:,} |"
        )
    return lines


def _starts(question: Question, measured: list[tuple[str, float, Any]]) -> list[str]:
    lines = [
        f"| {_plain(question.x)} | | seconds to the first step | peak memory, GB | without pages of files, GB | token cache, MB |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {x:,.15g} | {line} | {each['seconds']:.1f} | {each['peak_bytes'] / 1e9:.2f} | {each['anonymous_bytes'] / 1e9:.2f} "
        f"| {each['token_bytes'] / 1e6:,.1f} |"
        for line, x, each in measured
    ]
    return lines


def _plain(x: str) -> str:
    return x.removesuffix(" (log scale)")


def _when(record: Record) -> str:
    moments = sorted(each["measured"]["at"] for each in record["points"].values())
    commits = sorted({each["measured"]["commit"] for each in record["points"].values()})
    span = moments[0] if moments[0] == moments[-1] else f"{moments[0]} to {moments[-1]}"
    return f"{span}, commit {', '.join(commits)}"
