"""The training loop: passes, pruning, logging, validation, checkpoints, stopping. One call from first update to last.

Passes are dispatched several at a time; between two log points nothing leaves the devices, and one dispatch is queued behind the one
that runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.pruning import Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.masks import keep_counts, sparsity_of
from jaxpeft.pruning.scores import Criterion, magnitude
from jaxpeft.tasks.metrics import score
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.input_pipeline import Draw, Prefetched, TrainSteps
from jaxpeft.training.step import Metrics, TrainState, allocate_step, prune_step
from jaxpeft.training.throughput import ThroughputMeter, first_bad_step
from jaxpeft.trees import Params

S = TypeVar("S")


class Log(Protocol):
    """Where measurements go (`report.log.MetricsLog`)."""

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Record `metrics` of `split` after update `step`."""


class Bar(Protocol):
    """What shows the progress (`report.terminal.TrainingBar`)."""

    def advance(self, step: int) -> None:
        """Show that `step` updates are done."""

    def show(self, step: int, *, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show the figures of a log interval."""


@dataclass(frozen=True)
class Plan:
    """When what happens, in updates. `pruning` is None for a dense adapter, and an `Allocation` for AdaLoRA.

    `criterion` scores the entries when a `Schedule` prunes; an `Allocation` has scores of its own.

    `patience` None never stops early. `passes_per_dispatch` are run at most by one call, and no more than are done in
    `seconds_per_dispatch`, as far as is known: until they are, a signal waits. Where several processes train together that must be
    infinite, for they measure different seconds.
    """

    num_steps: int
    accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    metric: str
    learning_rate: Callable[[int], float]
    pruning: Schedule | Allocation | None = None
    criterion: Criterion = magnitude
    patience: int | None = None
    passes_per_dispatch: int = 1
    seconds_per_dispatch: float = math.inf

    @property
    def allocation(self) -> Allocation | None:
        """AdaLoRA's schedule, where there is one."""
        return self.pruning if isinstance(self.pruning, Allocation) else None

    def next_event(self, step: int) -> int:
        """The first update after `step` behind which the host has something to do."""
        following = range(step + 1, self.num_steps)
        return next((after for after in following if self._is_event(after)), self.num_steps)

    def _is_event(self, step: int) -> bool:
        due = self.pruning is not None and self.pruning.due(step)
        return due or step % self.log_every_steps == 0 or step % self.eval_every_steps == 0

    def passes_at_once(self, seconds_per_step: float) -> int:
        """How many passes to dispatch together where an update takes `seconds_per_step`: one where that is not known and matters."""
        if math.isinf(self.seconds_per_dispatch):
            return self.passes_per_dispatch
        seconds = max(seconds_per_step / self.accumulation_steps, 1e-9)
        return max(1, min(self.passes_per_dispatch, int(self.seconds_per_dispatch / seconds)))

    def up_to_whole_updates(self, done: int, most: int) -> int:
        """How many of at most `most` passes to dispatch after `done`: to the end of an update, where a signal is looked for."""
        size = self.accumulation_steps
        begun = done % size
        return min(most, size - begun) if begun or most < size else most // size * size

    def may_be_best(self, step: int) -> bool:
        """Whether an adapter of update `step` is what was asked for: before its last pruning it is denser."""
        return self.pruning is None or step >= self.pruning.last_step


@dataclass(frozen=True)
class Outcome:
    """How training ended: the last state and progress, its speed after the first log interval, and a signal that cut it short."""

    state: TrainState
    progress: Progress
    tokens_per_second: float
    seconds_per_step: float
    signal: int | None = None


def fit(
    state: TrainState,
    frozen: Params,
    plan: Plan,
    *,
    progress: Progress,
    draw_at: Callable[[int], Draw],
    train_steps: TrainSteps,
    validate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    metrics_log: Log,
    bar: Bar,
    stop_requested: Callable[[], int | None],
    validate_start: Callable[[], dict[str, float]] | None = None,
) -> Outcome:
    """Train from `progress.update` to the plan's end, or to an early stop, or to a signal (with a checkpoint).

    `draw_at` is a pure function of the pass, so that a resumed run sees the batches it would have seen. `validate_start` measures what the
    run started from: after the first log interval, as training need not wait for it.

    Raises:
        InputError: for a loss that is not finite, with its step; nothing is saved after it.
    """
    meter, size = ThroughputMeter(progress.update), plan.accumulation_steps
    started, seconds_before = time.monotonic(), progress.seconds
    passes, step, number = range(progress.update * size, plan.num_steps * size), progress.update, None
    with Prefetched(draw_at, passes, depth=2 * plan.passes_per_dispatch) as feed:
        # Patience is asked for here, not after a validation: a run that has stopped early and is resumed has nothing left to do.
        while step < plan.num_steps and not (plan.patience and progress.since_best >= plan.patience):
            state, step, number = train_until(
                plan.next_event(step),
                state,
                frozen,
                plan,
                step=step,
                feed=feed,
                train_steps=train_steps,
                meter=meter,
                bar=bar,
                stop_requested=stop_requested,
            )
            if plan.pruning and plan.pruning.due(step):
                state = _pruned(state, plan.pruning, plan.criterion, step)
            last = step == plan.num_steps
            if step % plan.log_every_steps == 0 or last or number:
                _report(state, step, plan, metrics_log, bar, meter)
            if validate_start and not number:  # after a signal there is no time for it
                paused = time.monotonic()
                metrics_log.write(0, "validation", validate_start())
                validate_start = None
                meter.leave_out(time.monotonic() - paused)
            progress = replace(progress, update=step, seconds=seconds_before + time.monotonic() - started)
            if step % plan.eval_every_steps == 0 or last:
                _require_finite(meter, step, plan)
                paused = time.monotonic()
                progress = validated(state, progress, plan, validate, checkpoints, metrics_log)
                meter.leave_out(time.monotonic() - paused)
            elif number:
                checkpoints.save(state, progress)
            if number:
                break
    return Outcome(state, progress, float(meter.tokens_per_second), meter.mean_seconds_per_step, number)


def train_until(
    until: int,
    state: S,
    frozen: Params,
    plan: Plan,
    *,
    step: int,
    feed: Prefetched,
    train_steps: Callable[[S, Params, list[Draw]], tuple[S, Metrics]],
    meter: ThroughputMeter,
    bar: Bar,
    stop_requested: Callable[[], int | None],
) -> tuple[S, int, int | None]:
    """Dispatch the passes that lead from update `step` to update `until`, or to a signal.

    Returns:
        the state, the update that was reached, and the signal's number, or None.
    """
    done, size, number = step * plan.accumulation_steps, plan.accumulation_steps, None
    while done < until * size and not number:
        most = plan.up_to_whole_updates(done, plan.passes_at_once(meter.seconds_per_step))
        draws = feed.take(min(until * size - done, most))
        state, metrics = train_steps(state, frozen, draws)
        meter.add(metrics, len(draws))
        done += len(draws)
        if done % size == 0:
            step = done // size
            bar.advance(step)
            number = stop_requested()
    return state, step, number


def _pruned(state: TrainState, schedule: Schedule | Allocation, criterion: Criterion, step: int) -> TrainState:
    sites = state.adapters["sites"]
    if isinstance(schedule, Allocation):
        return allocate_step(state, schedule.budget_at(step, len(sites)), step == schedule.last_step)
    return prune_step(state, keep_counts(sites, schedule.sparsity_at(step)), criterion=criterion)


def _report(state: TrainState, step: int, plan: Plan, metrics_log: Log, bar: Bar, meter: ThroughputMeter) -> None:
    _require_finite(meter, step, plan)
    metrics = {name: float(value) for name, value in meter.flush(step).items()}
    metrics_log.write(step, "train", {**metrics, **figures_of(state, step, plan)})
    left = (plan.num_steps - step) * meter.seconds_per_step
    bar.show(step, loss=metrics["loss"], tokens_per_second=metrics["tokens_per_second"], seconds_left=left)


def figures_of(state: TrainState, step: int, plan: Plan) -> dict[str, float]:
    """What a log line says of update `step` besides the passes' metrics: sparsity, where there are masks, and learning rate."""
    sparsity = {"sparsity": sparsity_of(state.masks)} if state.masks else {}
    return {**sparsity, "learning_rate": float(plan.learning_rate(step - 1))}


def not_finite(losses: np.ndarray, step: int, plan: Plan) -> InputError | None:
    """The error that ends a run whose `losses: [passes]` up to update `step` are not all finite; None where they are."""
    bad = first_bad_step(losses, step, plan.accumulation_steps)
    if bad is None:
        return None
    loss = losses[~np.isfinite(losses)][0]
    return InputError(
        f"the loss is {loss} at step {bad}; try a smaller training.learning_rate; the last checkpoint before it is kept"
    )


def _require_finite(meter: ThroughputMeter, step: int, plan: Plan) -> None:
    """Refuse to go on, and so to save, after a loss that is not finite."""
    if (losses := meter.pending().get("loss")) is not None and (error := not_finite(losses, step, plan)):
        raise error


def validated(
    state: TrainState,
    progress: Progress,
    plan: Plan,
    validate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    metrics_log: Log,
) -> Progress:
    """Validate, save, and note whether this is the best adapter so far."""
    metrics = validate(state)
    metrics_log.write(progress.update, "validation", metrics)
    value = score(metrics, plan.metric)
    if plan.may_be_best(progress.update):
        # Larger than nothing is every number, but not NaN: the correlation of constant predictions.
        if value > (-math.inf if progress.best_score is None else progress.best_score):
            progress = replace(progress, best_update=progress.update, best_score=value, since_best=0)
        else:
            progress = replace(progress, since_best=progress.since_best + 1)
    checkpoints.save(state, progress)
    return progress
