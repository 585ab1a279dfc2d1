"""The training loop of runs that train together (`training/sweep.py`): what `loop.fit` does for one run, for each of them.

Every run has its own plan, log, validations, checkpoints and end; what they share is the program that trains them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.masks import keep_counts
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.input_pipeline import Draw, Prefetched
from jaxpeft.training.loop import Bar, Log, Outcome, Plan, figures_of, not_finite, train_until, validated
from jaxpeft.training.step import Metrics, TrainState
from jaxpeft.training.sweep import Replicas, allocate_replicas, prune_replicas, unstack
from jaxpeft.training.throughput import ThroughputMeter
from jaxpeft.trees import Params

SweepSteps = Callable[[Replicas, Params, list[Draw]], tuple[Replicas, Metrics]]


@dataclass
class Run:
    """One of the runs, as the loop sees it; `outcome` is there once it has ended: how, or why it could not go on.

    `own` is its state as it would be alone: of the shapes that a checkpoint and an export have.
    """

    plan: Plan
    progress: Progress
    own: TrainState
    validate: Callable[[TrainState], dict[str, float]]
    checkpoints: Checkpoints
    metrics_log: Log
    outcome: Outcome | InputError | None = None
    validate_start: Callable[[], dict[str, float]] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do: to its plan's end, or early, or in an error."""
        patience = self.plan.patience
        stopped = bool(patience and self.progress.since_best >= patience)
        return self.outcome is not None or stopped or self.progress.update >= self.plan.num_steps


def fit_together(
    replicas: Replicas,
    frozen: Params,
    runs: Sequence[Run],
    *,
    draw_at: Callable[[int], Draw],
    train_steps: SweepSteps,
    bar: Bar,
    stop_requested: Callable[[], int | None],
) -> list[Outcome | InputError]:
    """Train all `runs`, which are at the same update, to their ends; or all of them to a signal (with a checkpoint of each).

    A run whose loss is not finite ends with the error that it would have raised alone; the others go on. So they do when one stops
    early: its place in the program is computed and nobody looks at it.

    Returns:
        for each run how it ended; where a signal came, `Outcome.signal` says so.
    """
    plan, step = runs[0].plan, runs[0].progress.update
    assert {run.progress.update for run in runs} == {step}, "runs that train together are at the same update"
    meter, size, started = ThroughputMeter(step), plan.accumulation_steps, time.monotonic()
    before = [run.progress.seconds for run in runs]
    with Prefetched(draw_at, range(step * size, plan.num_steps * size), depth=2 * plan.passes_per_dispatch) as feed:
        while step < plan.num_steps and not all(run.has_ended for run in runs):
            replicas, step, number = train_until(
                min(run.plan.next_event(step) for run in runs),
                replicas,
                frozen,
                plan,
                step=step,
                feed=feed,
                train_steps=train_steps,
                meter=meter,
                bar=bar,
                stop_requested=stop_requested,
            )
            replicas = replace(replicas, state=_pruned(replicas.state, runs, step))
            last = step == plan.num_steps
            logs, validates = step % plan.log_every_steps == 0, step % plan.eval_every_steps == 0
            if not (logs or validates or last or number):
                continue
            _end_what_is_not_finite(runs, meter, step)
            # A log line says of the state how sparse it is, and nothing else.
            if validates or last or number or replicas.state.masks:
                for run, state in zip(runs, unstack(replicas.state, [run.own for run in runs]), strict=True):
                    run.own = run.own if run.has_ended else state
            if logs or last or number:
                _report(runs, meter, step, bar)
            paused = time.monotonic()
            if not number:
                _validate_starts(runs)
            for run, seconds in zip(runs, before, strict=True):
                if not run.has_ended:
                    run.progress = replace(run.progress, update=step, seconds=seconds + time.monotonic() - started)
                    _save(run, validates or last, number)
                    if number or run.has_ended:
                        run.outcome = Outcome(run.own, run.progress, 0.0, 0.0, number)
            meter.leave_out(time.monotonic() - paused)
            if number:
                break
    speeds = np.broadcast_to(meter.tokens_per_second, len(runs))
    return [_ended(run, float(speed), meter) for run, speed in zip(runs, speeds, strict=True)]


def _validate_starts(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.validate_start and not run.has_ended:
            run.metrics_log.write(0, "validation", run.validate_start())
        run.validate_start = None


def _save(run: Run, validates: bool, number: int | None) -> None:
    if validates:
        run.progress = validated(run.own, run.progress, run.plan, run.validate, run.checkpoints, run.metrics_log)
    elif number:
        run.checkpoints.save(run.own, run.progress)


def _ended(run: Run, tokens_per_second: float, meter: ThroughputMeter) -> Outcome | InputError:
    if isinstance(run.outcome, InputError):
        return run.outcome
    outcome = run.outcome or Outcome(run.own, run.progress, 0.0, 0.0)  # a resumed run may have had nothing left to do
    return replace(outcome, tokens_per_second=tokens_per_second, seconds_per_step=meter.mean_seconds_per_step)


def _end_what_is_not_finite(runs: Sequence[Run], meter: ThroughputMeter, step: int) -> None:
    losses = meter.pending().get("loss")
    for i, run in enumerate(runs):
        if losses is not None and not run.has_ended and (error := not_finite(losses[:, i], step, run.plan)):
            run.outcome = error


def _report(runs: Sequence[Run], meter: ThroughputMeter, step: int, bar: Bar) -> None:
    means = meter.flush(step)
    for i, run in enumerate(runs):
        if not run.has_ended:
            own = {name: float(values[i]) for name, values in means.items()}
            run.metrics_log.write(step, "train", {**own, **figures_of(run.own, step, run.plan)})
    going = [i for i, run in enumerate(runs) if not run.has_ended]
    if going:
        left = (runs[0].plan.num_steps - step) * meter.seconds_per_step
        speed = float(means["tokens_per_second"].sum())
        bar.show(step, loss=float(means["loss"][going].mean()), tokens_per_second=speed, seconds_left=left)


def _pruned(state: TrainState, runs: Sequence[Run], step: int) -> TrainState:
    schedules = [run.plan.pruning for run in runs]
    due = np.asarray([schedule is not None and schedule.due(step) for schedule in schedules])
    if not due.any():
        return state
    allocations = [schedule for schedule in schedules if isinstance(schedule, Allocation)]
    if allocations:
        budgets = [schedule.budget_at(step, len(state.adapters["sites"])) for schedule in allocations]
        last = [step == schedule.last_step for schedule in allocations]
        return allocate_replicas(state, np.asarray(budgets), np.asarray(last), due)
    num_keep = [
        keep_counts(
            run.own.adapters["sites"],
            0.0 if isinstance(s := run.plan.pruning, Allocation | None) else s.sparsity_at(step),
        )
        for run in runs
    ]
    stacked = jax.tree.map(lambda *counts: jnp.asarray(counts), *num_keep)
    # Runs of different criteria may train together, and each criterion is a program of its own.
    for criterion in dict.fromkeys(run.plan.criterion for run in runs):
        own = due & np.asarray([run.plan.criterion is criterion for run in runs])
        state = prune_replicas(state, stacked, own, criterion=criterion) if own.any() else state
    return state
