"""Time and peak memory of a training step, each point in a process of its own (`benchmarks.speed.worker`)."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.growth.questions import Work
from benchmarks.speed.cases import Case, OurMethod
from benchmarks.speed.machine import measured_now
from benchmarks.speed.rounds import WARM_ROUNDS, Paths, workers, write_workload


def measure_steps(works: Iterable[Work], *, rounds: int) -> Iterator[tuple[Work, dict[str, Any]]]:
    """Each of `works` with its figures, as they are measured. Works on the same model and batches follow each other."""

    def batches(work: Work) -> tuple[str, int, int, int]:
        return work.model, work.layers, work.rows, work.length

    for _, group in groupby(sorted(works, key=batches), key=batches):
        same = list(group)
        with tempfile.TemporaryDirectory() as directory:
            write_workload(case_of(same[0]), Path(), Path(directory), Paths())
            for work in same:
                yield work, _measure(work, Path(directory), rounds)


def case_of(work: Work) -> Case:
    """The work as a case of `benchmarks.speed`."""
    return Case(
        "growth", work.key, work.config, "masked-lm", work.rows, work.length, work.steps_per_round, methods=("lora",)
    )


def method_of(work: Work) -> OurMethod:
    """The adapters of the work, and the passes of a batch."""
    layers = None if work.adapted is None else list(work.adapted)
    adapter = {"rank": work.rank, "alpha": 2 * work.rank, "layers_to_transform": layers}
    return OurMethod(adapter, training={"micro_batch_size": work.rows} if work.one_pass else {})


def _measure(work: Work, workload: Path, rounds: int) -> dict[str, Any]:
    with workers(["ours"], Paths()) as (worker,):
        start = worker.ask(
            "start", case=asdict(case_of(work)), method=asdict(method_of(work)), workload=str(workload), variant=""
        )
        for _ in range(WARM_ROUNDS["ours"]):
            worker.ask("round")
        worker.ask("memory", reset=True)
        timed = [worker.ask("round") for _ in range(rounds)]
        memory = worker.ask("memory")
    seconds = [each["seconds"] / each["updates"] for each in timed]
    return {
        "seconds": _rounded(statistics.median(seconds)),
        "seconds_spread": [_rounded(min(seconds)), _rounded(max(seconds))],
        "peak_bytes": memory["device"] or memory["training"],
        "rows_per_pass": timed[0]["rows_per_pass"],
        "trained": start["trainable"],
        "measured": measured_now(),
    }


def _rounded(seconds: float) -> float:
    """Four digits: more than any timing has."""
    return float(f"{seconds:.4g}")
