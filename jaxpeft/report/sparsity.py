"""`sparsity.jsonl` and `sparsity.png`: which entries of an adapter were left, over the steps. Readable in black and white."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from jaxpeft.errors import InputError
from jaxpeft.report.metrics_log import read_metrics

Record = dict[str, Any]
"""A line of the file: the result of `jaxpeft.pruning.record.mask_record`."""

_KEYS = ("step", "kept", "size", "churn")


def read_records(path: Path) -> list[Record]:
    """The records of a `sparsity.jsonl`, one for each step, in the order of the steps; [] if there is no file.

    A resumed run repeats the steps after its checkpoint, so the last record of a step counts. A last line that was cut off while it
    was written is left out.

    Raises:
        InputError: if a line is no record.
    """
    rows = read_metrics(path)
    for row in rows:
        if not isinstance(row, dict) or any(key not in row for key in _KEYS):
            raise InputError(f"{path} has a line without {', '.join(_KEYS)}: it is no log of sparsity")
    return [record for _, record in sorted({row["step"]: row for row in rows}.items())]


def ranks_by_place(record: Record) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """The ranks that are left: numbers of layers, names of modules, and (layer, module) → ranks.

    `bert/encoder/layer/3/attention/self/query` is layer 3 and the module `attention.self.query`. A path without a number has the layer "–".
    """
    ranks = {_place(path): left for path, left in record.get("ranks", {}).items()}
    layers = sorted({layer for layer, _ in ranks}, key=lambda layer: int(layer) if layer.isdigit() else -1)
    return layers, sorted({module for _, module in ranks}), ranks


def plot_sparsity(records: Sequence[Record], path: Path, title: str) -> Path:
    """Draw `records`: the sparsity of every tensor over the steps, the churn of the masks, and the ranks that are left.

    The last is a map of layers × modules after the last record, and left out if the records have no ranks. `records` is not empty.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps global state and may want a display

    layers, modules, ranks = ranks_by_place(records[-1])
    heights = [3.0, 1.2, *([0.9 + 0.3 * len(layers)] if ranks else [])]
    figure = Figure(figsize=(7, sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(heights), 1, height_ratios=heights)
    _draw_tensors(axes[0], records)
    axes[0].set(title=title, ylabel="pruned (%)", ylim=(0, 101), xlabel="step")
    steps = [record["step"] for record in records]
    axes[1].vlines(steps, 0, [100 * record["churn"] for record in records], color="black")
    axes[1].set(ylabel="changed (%)", ylim=(0, None), xlim=axes[0].get_xlim(), xlabel="step")
    for axis in axes[:2]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9")
    if ranks:
        _draw_ranks(axes[2], layers, modules, ranks)
    figure.savefig(path, dpi=150)
    return path


def _place(path: str) -> tuple[str, str]:
    parts = path.split("/")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ("–", ".".join(parts)) if number is None else (parts[number], ".".join(parts[number + 1 :]))


def _draw_tensors(axis: Any, records: Sequence[Record]) -> None:
    """A line for each tensor; tensors of the same name in different layers look the same."""
    dashes = cycle(["-", "--", ":", "-."])
    looks: dict[str, dict[str, Any]] = {}
    steps = [0, *(record["step"] for record in records)]
    for tensor in records[-1]["size"]:
        path, _, name = tensor.rpartition(":")
        kind = f"{_place(path)[1].rpartition('.')[2]} {name}"
        known = kind in looks
        look = looks.setdefault(kind, {"color": f"C{len(looks) % 10}", "linestyle": next(dashes)} if not known else {})
        shares = [100 * (1 - record["kept"].get(tensor, 0) / record["size"].get(tensor, 1)) for record in records]
        axis.step(steps, [0, *shares], where="post", linewidth=1, label=None if known else kind, **look)
    axis.legend(frameon=False, fontsize="small", ncols=2)


def _draw_ranks(axis: Any, layers: list[str], modules: list[str], ranks: dict[tuple[str, str], int]) -> None:
    most = max(ranks.values())
    shades = [[ranks.get((layer, module), float("nan")) for module in modules] for layer in layers]
    axis.imshow(shades, cmap="Greys", vmin=0, vmax=max(most, 1), aspect="auto")
    for (layer, module), left in ranks.items():
        colour = "white" if left > most / 2 else "black"
        axis.text(modules.index(module), layers.index(layer), str(left), ha="center", va="center", color=colour)
    axis.set(title="ranks left", ylabel="layer")
    axis.set_xticks(range(len(modules)), modules, fontsize="small")
    axis.set_yticks(range(len(layers)), layers)
