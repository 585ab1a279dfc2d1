"""Log metrics while a run trains: `metrics.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class MetricsLog:
    """Appends one JSON object per line, `{"step": …, "split": "train", "loss": …}`, and writes the same to TensorBoard.

    `resumed_at` is the step of the checkpoint from which the run resumes, or 0. Later rows of an interrupted run are
    dropped. With several processes, only the one with `writes` touches the files.
    """

    def __init__(self, path: Path, tensorboard: Path, resumed_at: int, *, writes: bool = True) -> None:
        """Open the file `path` and the directory `tensorboard` for writing."""
        self._writes = writes
        if not writes:
            return
        self.path = path
        # Drop rows after the checkpoint: the resumed run measures those steps again.
        rows = [row for row in read_metrics(self.path) if row["step"] <= resumed_at] if resumed_at else []
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a")
        self._events = _event_writer(tensorboard, purge_step=resumed_at + 1 if resumed_at else None)

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Record the `metrics` of `split` after step `step`. They are on disk when this returns."""
        if not self._writes:
            return
        self._file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writes:
            self._file.close()
            self._events.close()


def _event_writer(directory: Path, *, purge_step: int | None) -> Any:
    # tensorboardX imports torch if it is installed, to support its tensors. That takes two seconds, and we write none.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # None makes `import torch` raise ImportError
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(directory), purge_step=purge_step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`, up to a last line that was cut off while it was written."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
