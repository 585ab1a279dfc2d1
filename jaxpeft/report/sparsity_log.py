"""Log the masks of a run while it is pruned: `sparsity.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

import jax

from jaxpeft.pruning.record import mask_record
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.trees import Layers


class SparsityLog:
    """Appends a record (`pruning.record.mask_record`), a JSON object in a line, for every step at which the masks change.

    `resumed_at` is the step of the checkpoint from which the run resumes, or 0. Later records of an interrupted run are dropped.
    With several processes, only the one with `writes` touches the file.
    """

    def __init__(self, path: Path, resumed_at: int, *, writes: bool = True) -> None:
        """Keep the records of the file `path` up to the step `resumed_at`."""
        self.path, self._writes = path, writes
        if not writes:
            return
        rows = [row for row in read_metrics(path) if row["step"] <= resumed_at] if resumed_at else []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, step: int, masks: Layers, before: Layers) -> None:
        """Record the `masks` after `step` and their changes since `before`. They are on disk when this returns."""
        # Every process fetches them, because the masks are on the devices of all.
        record = mask_record(step, *jax.device_get((masks, before)))
        if not self._writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
