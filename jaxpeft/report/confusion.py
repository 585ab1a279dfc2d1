"""`confusion.png`: which classes a classification takes for which. Readable in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MOST_NUMBERS = 20
_MOST_NAMES = 40
_LONGEST_NAME = 24


def plot_confusion(confusion: Sequence[Sequence[int]], names: Sequence[str], path: Path, title: str) -> Path:
    """Draw the rows of each class by their predicted class, and return `path`.

    A square's shade is the share of its class, so that a rare class is as visible as a frequent one. The number of rows is written
    into the squares of up to 20 classes.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

    counts = np.asarray(confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.55 * len(names) + 2), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
    if len(names) <= _MOST_NUMBERS:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    if len(names) <= _MOST_NAMES:
        short = [_plain(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…") for name in names]
        axes.set_xticks(range(len(names)), short, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), short)
    axes.set(title=_plain(title), xlabel="predicted class", ylabel="class")
    figure.colorbar(image, label="share of the class's rows", shrink=0.8)
    figure.savefig(path, dpi=150)
    return path


def _plain(text: str) -> str:
    """`text` as it is: matplotlib would read a formula between two dollar signs."""
    return text.replace("$", r"\$")
