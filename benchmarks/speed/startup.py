"""Time from `python train.py` to the first step: the quickstart, first with an empty compilation cache and then with a warm one.

The first step is done when its training record stands in `metrics.jsonl`; by then the run has imported everything, read and
tokenised its data, and taken the training program from the cache. The initial model is evaluated after that.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from benchmarks.speed.rounds import ROOT
from jaxpeft.runs.directory import RunDirectory

_POLL_SECONDS = 0.02


def first_step_seconds(output_dir: Path, cache: Path, *flags: str) -> float:
    """Run the quickstart with `flags` up to its first training record, end it, and return the wall time.

    Raises:
        RuntimeError: if the run ends before that.
    """
    with started(output_dir, cache, *flags) as run:
        return run.seconds_to_step(1)


class Started:
    """A run in a process of its own."""

    def __init__(self, command: list[str], process: subprocess.Popen[str], metrics: Path, errors: IO[str]) -> None:
        self.pid = process.pid
        self._command, self._process, self._metrics, self._errors = command, process, metrics, errors
        self._since = time.perf_counter()

    def seconds_to_step(self, step: int) -> float:
        """Wait for the training record of `step`, or of a later one; return the wall time since the start.

        Raises:
            RuntimeError: if the run ends before that.
        """
        while last_trained_step(self._metrics) < step:
            if self._process.poll() is not None:
                self._errors.seek(0)
                raise RuntimeError(f"{' '.join(self._command)} ended before step {step}:\n{self._errors.read()}")
            time.sleep(_POLL_SECONDS)
        return time.perf_counter() - self._since


@contextmanager
def started(output_dir: Path, cache: Path, *flags: str) -> Iterator[Started]:
    """The quickstart with `flags`, with its compiled programs in `cache`. It is ended afterwards."""
    # The flags first: a `--config` among them would override what stands before it.
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--output_dir", str(output_dir), "--name", "run"]
    command += ["--training.log_every_steps", "1"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    output_dir.mkdir(parents=True)
    with (output_dir / "errors.txt").open("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors, text=True)
        try:
            yield Started(command, process, RunDirectory(output_dir / "run").metrics, errors)
        finally:
            process.kill()
            process.wait()


def last_trained_step(metrics: Path) -> int:
    """The step of the last training record of a run, or 0 if it has none yet."""
    if not metrics.is_file():
        return 0
    whole_lines = metrics.read_text().split("\n")[:-1]
    records = [json.loads(line) for line in whole_lines]
    return max((record["step"] for record in records if record["split"] == "train"), default=0)


def measure(directory: Path, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds with an empty cache, and the median of `repeats` with a warm one."""
    cold = first_step_seconds(directory / "cold", directory / "cache")
    warm = [first_step_seconds(directory / f"warm-{i}", directory / "cache") for i in range(repeats)]
    return {
        "cold_seconds": round(cold, 2),
        "warm_seconds": round(statistics.median(warm), 2),
        "warm_spread": [round(min(warm), 2), round(max(warm), 2)],
    }
