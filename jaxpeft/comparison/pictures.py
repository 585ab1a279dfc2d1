"""The pictures of a comparison, as SVG. Each method has its own marker, dash and hatch, so that black-and-white prints are clear."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.comparison.summary import Row
from jaxpeft.tasks.metrics import get_metric

_MARKERS = "os^DvPX*<>hp"
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)))
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "**", "||")
_SIZE = (6.4, 4.4)
_WIDE = (9.6, 5.4)
_MANY = 8
"""Methods from which the legend stands beside the picture, because inside it would hide points."""


def draw(rows: Sequence[Row], directory: Path, task: str) -> dict[str, Path]:
    """Draw a task's pictures into `directory`. Returns caption → file, without pictures for which there are no figures."""
    directory.mkdir(parents=True, exist_ok=True)
    metric = rows[0].metrics[0]
    name = get_metric(metric).title
    pictures: dict[str, Callable[[Any], bool]] = {
        f"{task}: {name} against kept parameters": lambda axes: _against(
            axes, rows, metric, lambda row: row.kept_parameters, "trained parameters that pruning kept (log scale)"
        ),
        f"{task}: {name} against training time": lambda axes: _against(
            axes, rows, metric, lambda row: row.training_seconds, "training time of one run (s, log scale)"
        ),
        f"{task}: validation {name} while training (mean, smallest and largest of the seeds)": lambda axes: _curves(
            axes, rows, metric
        ),
        f"{task}: peak memory": lambda axes: _memory(axes, rows),
    }
    files = {}
    for kind, (caption, onto) in zip(("parameters", "time", "curves", "memory"), pictures.items(), strict=True):
        if _draw(onto, caption, directory / f"{task}-{kind}.svg"):
            files[caption] = directory / f"{task}-{kind}.svg"
    return files


def _draw(onto: Callable[[Any], bool], caption: str, path: Path) -> bool:
    import matplotlib
    from matplotlib.figure import Figure

    # hashsalt and the missing date make the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "jaxpeft", "font.size": 10}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.subplots()
        if not onto(axes):
            return False
        _legend(axes)
        axes.set_title(textwrap.fill(caption, 60), fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})
    return True


def _against(axes: Any, rows: Sequence[Row], metric: str, x_of: Callable[[Row], float | None], label: str) -> bool:
    shown = [(i, row, x) for i, row in enumerate(rows) if (x := x_of(row)) is not None]
    for i, row, x in shown:
        quality = row.quality(metric)
        axes.errorbar(
            x,
            quality.mean,
            yerr=quality.deviation,
            marker=_MARKERS[i % len(_MARKERS)],
            markerfacecolor=_grey(i, len(rows)),
            markeredgecolor="black",
            ecolor="black",
            markersize=8,
            capsize=3,
            linestyle="none",
            label=row.title,
        )
    axes.set(
        xscale="log", xlabel=label, ylabel=f"{_label(metric, rows[0].any.test_split)}\n± standard deviation over seeds"
    )
    # Within one decade, labels at powers of ten only would leave the axis nearly empty.
    if shown and max(x for _, _, x in shown) < 10 * min(x for _, _, x in shown):
        _plain_numbers(axes.xaxis, subs=(1, 2, 3, 4, 5, 6, 8))
    _scale(axes, metric, [row.quality(metric).mean for _, row, _ in shown])
    axes.grid(color="0.92")
    return bool(shown)


def _curves(axes: Any, rows: Sequence[Row], metric: str) -> bool:
    """Draw the mean over the seeds, and a band from the smallest to the largest."""
    values: list[float] = []
    for i, row in enumerate(rows):
        curves = [
            {each["step"]: each[metric] for each in record.curve if metric in each} for record in row.runs.values()
        ]
        # Only steps that all seeds reached: beyond an early stop the mean would be of fewer runs.
        steps = sorted(set.intersection(*(set(curve) for curve in curves)) - {0})
        if not steps:
            continue
        at = np.array([[curve[step] for step in steps] for curve in curves])
        style = {"color": _grey(i, len(rows), darkest=0.0, lightest=0.55), "linestyle": _DASHES[i % len(_DASHES)]}
        axes.plot(steps, at.mean(0), marker=_MARKERS[i % len(_MARKERS)], markersize=4, label=row.title, **style)
        axes.fill_between(steps, at.min(0), at.max(0), color=style["color"], alpha=0.15, linewidth=0)
        values += at.mean(0).tolist()
    axes.set(xlabel="step", ylabel=_label(metric, "validation"))
    _scale(axes, metric, values)
    axes.grid(color="0.92")
    return bool(values)


def _memory(axes: Any, rows: Sequence[Row]) -> bool:
    shown = [(i, row, row.cost) for i, row in enumerate(rows) if row.cost]
    for place, (i, _, cost) in enumerate(shown):
        size = cost.peak_memory_bytes / 1e9
        axes.barh(place, size, color="0.85", edgecolor="black", hatch=_HATCHES[i % len(_HATCHES)])
        axes.annotate(f" {size:.2f}", (size, place), va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [row.title for _, row, _ in shown])
    axes.invert_yaxis()
    of = shown[0][2].peak_memory_of if shown else ""
    axes.set(xlabel=f"peak memory of the {of} (GB)")
    axes.margins(x=0.12)
    return bool(shown)


def _scale(axes: Any, metric: str, values: Sequence[float]) -> None:
    if not get_metric(metric).larger_is_better and values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, subs=(1, 2, 5))


def _plain_numbers(axis: Any, *, subs: Sequence[int]) -> None:
    """Label a logarithmic axis with plain numbers, at `subs` times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label(metric: str, split: str) -> str:
    better = "higher" if get_metric(metric).larger_is_better else "lower"
    return f"{split} {get_metric(metric).title} ({better} is better)"


def _legend(axes: Any) -> None:
    number = len(axes.get_legend_handles_labels()[1])
    if number > _MANY:
        axes.figure.set_size_inches(_WIDE)
        axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    elif number:
        axes.legend(frameon=False, fontsize=9)


def _grey(i: int, number: int, *, darkest: float = 0.15, lightest: float = 0.95) -> str:
    return str(round(darkest + (lightest - darkest) * i / max(number - 1, 1), 3))
