"""A picture for each question, as SVG: time on the left, memory on the right. Each line has its name at its end.

The colours are Okabe and Ito's, which people with any colour vision can tell apart; markers and dashes tell lines apart without colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.growth.questions import Question, Start

_STYLES = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
)


def draw(record: Mapping[str, Any], questions: Mapping[str, Question], directory: Path) -> list[Path]:
    """Draw each question that has a measured point into `directory`; return the files."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, question in questions.items():
        if not any(point.key in record["points"] for point in question.points):
            continue
        is_start = isinstance(question.points[0], Start)
        # hashsalt and the missing date make the same figures give the same file; text stays text.
        with matplotlib.rc_context({"svg.hashsalt": "jaxpeft", "svg.fonttype": "none", "font.size": 10}):
            figure = Figure(figsize=(9.6, 3.8), layout="constrained")
            figure.suptitle(question.title, fontsize=12)
            left, right = figure.subplots(1, 2)
            _panel(left, record, question, "seconds", 1, "s to the first step" if is_start else "s a step")
            _panel(right, record, question, "peak_bytes", 1e9, "peak memory, GB")
            files.append(directory / f"{name}.svg")
            figure.savefig(files[-1], metadata={"Date": None})
    return files


def _panel(axes: Any, record: Mapping[str, Any], question: Question, field: str, unit: float, label: str) -> None:
    ticks, ends = set(), []
    for (line, points), style in zip(question.lines.items(), _STYLES, strict=False):
        measured = [
            (x, record["points"][point.key][field] / unit) for x, point in points if point.key in record["points"]
        ]
        if not measured:
            continue
        xs, ys = zip(*measured, strict=True)
        axes.plot(xs, ys, markersize=5, **style)
        ticks |= set(xs)
        ends.append((line, xs[-1], ys[-1], style["color"]))
    if question.log:
        axes.set_xscale("log")
    axes.set(xlabel=question.x, ylabel=label)
    axes.set_ylim(0, None)
    axes.margins(x=0.06)
    axes.set_xticks(sorted(ticks), _labels(sorted(ticks), thin=not question.log))
    axes.minorticks_off()
    _name_lines(axes, ends)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")


def _labels(ticks: list[float], *, thin: bool) -> list[str]:
    """The ticks as text. With `thin`, a label that would stand on the one before it is left out."""
    room = 0.05 * ticks[-1] if thin else 0.0
    labels, last = [], -room
    for x in ticks:
        fits = x - last >= room
        labels.append(f"{x:,.15g}" if fits else "")
        last = x if fits else last
    return labels


def _name_lines(axes: Any, ends: list[tuple[str, float, float, str]]) -> None:
    """Write each line's name beside its last point, or above it if another line goes on. Names that would meet are moved apart."""
    room, furthest = 0.07 * axes.get_ylim()[1], max(x for _, x, _, _ in ends)
    above: float | None = None
    for name, x, y, color in sorted(ends, key=lambda end: end[2]):
        place = y if above is None else max(y, above + room)
        above = place
        beside = x == furthest
        axes.annotate(
            f"\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}{name}"
            if beside and name
            else name,  # SVG drops other leading spaces
            (x, y),
            xytext=(x, place if beside else place + room / 2),
            color=color,
            fontsize=9,
            va="center" if beside else "bottom",
            ha="left" if beside else "center",
            annotation_clip=False,
        )
