"""`curves.png`: loss and, for pruned runs, sparsity over the steps. Readable in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def plot_curves(rows: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw the training and validation loss of `metrics.jsonl`'s `rows` and, if the adapter was pruned, its sparsity below."""
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    pruned = any(row.get("sparsity") for row in train)
    figure = Figure(figsize=(7, 5.5 if pruned else 4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)) if pruned else [figure.subplots()]
    axes[0].plot(*_series(train, "loss"), color="0.55", linewidth=1, label="training")
    axes[0].plot(*_series(validation, "loss"), color="black", marker="o", markersize=4, label="validation")
    axes[0].set(title=title, ylabel="loss (nats a label)")
    axes[0].legend(frameon=False)
    if pruned:
        steps, sparsity = _series(train, "sparsity")
        axes[1].step(steps, [100 * value for value in sparsity], where="post", color="black")
        axes[1].set(ylabel="pruned (%)", ylim=(0, None))
    axes[-1].set(xlabel="step")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
    figure.savefig(path, dpi=150)
    return path


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in rows if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]
