"""Log how many entries of every tensor are kept while a run is pruned: `sparsity.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax

from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.trees import Layers, by_leaf


class SparsityLog:
    """Appends one JSON object per line, `{"step": …, "tensor": "encoder/layer/0/…/query/a", "kept": …, "size": …}`.

    There is a line for every tensor at every step at which the masks change; step 0 is before the first step. For whole ranks
    `kept` divided by the tensor's other axis is the rank that is left.

    `resumed_at` is the step of the checkpoint from which the run resumes, or 0. Later rows of an interrupted run are dropped.
    With several processes, only the one with `writes` touches the file.
    """

    def __init__(self, path: Path, resumed_at: int, *, writes: bool = True) -> None:
        """Keep the rows of the file `path` up to the step `resumed_at`."""
        self.path, self._writes = path, writes
        if not writes:
            return
        rows = [row for row in read_sparsity(path) if row["step"] <= resumed_at] if resumed_at else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, step: int, masks: Layers) -> None:
        """Record how many entries each of `masks` keeps after `step`. They are on disk when this returns."""
        # Every process counts, because the masks are on the devices of all.
        kept = jax.device_get(jax.tree.map(lambda mask: mask.sum(), masks))
        if not self._writes:
            return
        sizes = by_leaf(masks)
        rows = (
            {"step": step, "tensor": path, "kept": int(number), "size": int(sizes[path].size)}
            for path, number in by_leaf(kept).items()
        )
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read_sparsity(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `sparsity.jsonl`, up to a last line that was cut off while it was written."""
    return read_metrics(path)
