"""The record of `benchmarks.gpu`: the bounds, and the parts that it shares with a record of `benchmarks.speed`. Plain values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.gpu.steps import STEPS
from benchmarks.speed.cases import CASES
from benchmarks.speed.record import BOUNDS, Bound, check

Record = dict[str, Any]

GPU_BOUNDS = (
    *(bound for bound in BOUNDS if bound.key[0] == "cases" and CASES[bound.key[1]].device == "gpu"),
    Bound("8 members in one program, steps over one after the other", ("steps", "together", "result", "gain"), 4.0, True),
    Bound("step time of qlora over LoRA's there", ("cases", "bert-base-gpu", "qlora", "step_over_lora", "median"), 1.15, False),
)  # fmt: skip


def completed(record: Record) -> Record:
    """The record with the steps' figures where `benchmarks.speed` has them, and with the bounds. Tiny shapes have none."""
    results = {step: record["steps"].get(step.name, {}).get("result") or {} for step in STEPS}
    peaks = next((result for step, result in results.items() if step.kind == "peaks"), {})
    cases: dict[str, Any] = {}
    for step, result in results.items():
        for case, rows in result.items() if step.kind == "speed" else ():
            cases.setdefault(case, {}).update(rows)
    whole = {**record, "peaks": peaks, "cases": cases}
    return {**whole, "bounds": [] if record["tiny"] else check(whole, GPU_BOUNDS)}


def write(record: Record, output: Path) -> None:
    """Write the completed record. The file is replaced in one move, so that it is whole at any time."""
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(output.name + ".new")
    beside.write_text(json.dumps(completed(record), indent=1) + "\n")
    os.replace(beside, output)


def continued(record: Record, output: Path) -> Record:
    """`record` with the steps of an earlier call that wrote `output`.

    Raises:
        ValueError: the file is of another machine, of other versions or shapes, or is not such a record.
    """
    if not output.is_file():
        return record
    same = ("device_name", "machine", "versions", "tiny")
    try:
        earlier = json.loads(output.read_text())
        differing = [key for key in same if earlier[key] != record[key]]
        steps = dict(earlier["steps"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{output} is not a record of benchmarks.gpu; give another --output") from None
    if differing:
        raise ValueError(
            f"{output} has another {' and '.join(differing)} than this call; remove it, or give another --output"
        )
    return {**record, "steps": steps}
