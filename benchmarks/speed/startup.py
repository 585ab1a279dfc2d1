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
from pathlib import Path
from typing import Any

from benchmarks.speed.rounds import ROOT
from jaxpeft.runs.directory import RunDirectory

_POLL_SECONDS = 0.02


def first_step_seconds(output_dir: Path, cache: Path, *flags: str) -> float:
    """Run the quickstart with `flags` up to its first training record, end it, and return the wall time.

    Raises:
        RuntimeError: if the run ends before that.
    """
    command = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(output_dir), "--name", "run"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    output_dir.mkdir(parents=True)
    with (output_dir / "errors.txt").open("w+") as errors:
        run = subprocess.Popen(
            [*command, "--training.log_every_steps", "1", *flags],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            while not _has_trained(RunDirectory(output_dir / "run").metrics):
                if run.poll() is not None:
                    errors.seek(0)
                    raise RuntimeError(f"{' '.join(command)} ended before its first step:\n{errors.read()}")
                time.sleep(_POLL_SECONDS)
            return time.perf_counter() - started
        finally:
            run.kill()
            run.wait()


def _has_trained(metrics: Path) -> bool:
    if not metrics.is_file():
        return False
    whole_lines = metrics.read_text().split("\n")[:-1]
    return any(json.loads(line)["split"] == "train" for line in whole_lines)


def measure(directory: Path, *, repeats: int = 3) -> dict[str, Any]:
    """Seconds with an empty cache, and the median of `repeats` with a warm one."""
    cold = first_step_seconds(directory / "cold", directory / "cache")
    warm = [first_step_seconds(directory / f"warm-{i}", directory / "cache") for i in range(repeats)]
    return {
        "cold_seconds": round(cold, 2),
        "warm_seconds": round(statistics.median(warm), 2),
        "warm_spread": [round(min(warm), 2), round(max(warm), 2)],
    }
