"""The training loop: passes, pruning, logging, validation, checkpoints, stopping. One call from first update to last.

Passes are dispatched several at a time; between two log points the host waits for nothing that the devices compute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import jax
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.paths import Params
from jaxpeft.pruning import Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.masks import keep_counts, sparsity_of
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.feed import Draw, Prefetched, TrainSteps
from jaxpeft.training.metrics import score
from jaxpeft.training.step import Metrics, TrainState, allocate_step, prune_step


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
    """How training ended: the last state and progress, passes and real tokens a second, and a signal that cut it short."""

    state: TrainState
    progress: Progress
    tokens_per_second: float
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
    log: Log,
    bar: Bar,
    stop_requested: Callable[[], int | None],
) -> Outcome:
    """Train from `progress.update` to the plan's end, or to an early stop, or to a signal (with a checkpoint).

    `draw_at` is a pure function of the pass, so that a resumed run sees the batches it would have seen.

    Raises:
        InputError: for a loss that is not finite, with its step; nothing is saved after it.
    """
    meter, size = _Meter(plan, progress.update), plan.accumulation_steps
    started, seconds_before = time.monotonic(), progress.seconds
    passes, step = range(progress.update * size, plan.num_steps * size), progress.update
    with Prefetched(draw_at, passes, depth=2 * plan.passes_per_dispatch) as feed:
        # Patience is asked for here, not after a validation: a run that has stopped early and is resumed has nothing left to do.
        while step < plan.num_steps and not (plan.patience and progress.since_best >= plan.patience):
            until, done, number = plan.next_event(step), step * size, None
            while done < until * size and not number:
                most = plan.up_to_whole_updates(done, meter.passes_at_once)
                draws = feed.take(min(until * size - done, most))
                state, metrics = train_steps(state, frozen, draws)
                meter.add(metrics, len(draws))
                done += len(draws)
                if done % size == 0:
                    step = done // size
                    bar.advance(step)
                    number = stop_requested()
            if plan.pruning and plan.pruning.due(step):
                state = _pruned(state, plan.pruning, step)
            last = step == plan.num_steps
            if step % plan.log_every_steps == 0 or last or number:
                _report(meter.flush(step, state), step, plan, log, bar, meter)
            progress = replace(progress, update=step, seconds=seconds_before + time.monotonic() - started)
            if step % plan.eval_every_steps == 0 or last:
                meter.check_finite(step)
                paused = time.monotonic()
                progress = _validated(state, progress, plan, validate, checkpoints, log)
                meter.leave_out(time.monotonic() - paused)
            elif number:
                checkpoints.save(state, progress)
            if number:
                return Outcome(state, progress, meter.tokens_per_second, number)
    return Outcome(state, progress, meter.tokens_per_second)


def _pruned(state: TrainState, schedule: Schedule | Allocation, step: int) -> TrainState:
    sites = state.adapters["sites"]
    if isinstance(schedule, Allocation):
        return allocate_step(state, schedule.budget_at(step, len(sites)), step == schedule.last_step)
    return prune_step(state, keep_counts(sites, schedule.sparsity_at(step)))


def _report(metrics: dict[str, float], step: int, plan: Plan, log: Log, bar: Bar, meter: _Meter) -> None:
    log.write(step, "train", {**metrics, "learning_rate": float(plan.learning_rate(step - 1))})
    left = (plan.num_steps - step) * meter.seconds_per_step
    bar.show(step, loss=metrics["loss"], tokens_per_second=metrics["tokens_per_second"], seconds_left=left)


def _validated(
    state: TrainState,
    progress: Progress,
    plan: Plan,
    validate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    log: Log,
) -> Progress:
    """Validate, save, and note whether this is the best adapter so far."""
    metrics = validate(state)
    log.write(progress.update, "validation", metrics)
    value = score(metrics, plan.metric)
    if plan.may_be_best(progress.update):
        # Larger than nothing is every number, but not NaN: the correlation of constant predictions.
        if value > (-math.inf if progress.best_score is None else progress.best_score):
            progress = replace(progress, best_update=progress.update, best_score=value, since_best=0)
        else:
            progress = replace(progress, since_best=progress.since_best + 1)
    checkpoints.save(state, progress)
    return progress


class _Meter:
    """Keeps metrics on the device between log points, and the time and tokens of the passes."""

    def __init__(self, plan: Plan, start: int) -> None:
        self._plan = plan
        self._pending: list[tuple[Metrics, int]] = []
        self._all_tokens, self._all_seconds = 0.0, 0.0
        self._since, self._last = time.monotonic(), start
        self._first = True
        self.seconds_per_step = math.inf
        """Of the newest log interval."""

    def add(self, metrics: Metrics, num_passes: int) -> None:
        """Take in the metrics of one dispatch, `[num_passes or more]` each, and wait for the dispatch before it.

        So the devices always have the next one queued, and never more: a signal, which ends training behind what is queued, need
        not wait for a whole log interval, and no batches pile up on the devices. Nothing leaves them.
        """
        if self._pending:
            jax.block_until_ready(self._pending[-1][0])
        self._pending.append((metrics, num_passes))

    def flush(self, step: int, state: TrainState) -> dict[str, float]:
        """Wait for the passes since the last log point; return their means."""
        values = self._fetched()
        self._require_finite(values["loss"], step)
        seconds, steps = time.monotonic() - self._since, step - self._last
        tokens = float(values.pop("tokens").sum())
        result = {key: float(np.mean(value)) for key, value in values.items()}
        result["tokens_per_second"] = tokens / max(seconds, 1e-9)
        if state.masks:
            result["sparsity"] = sparsity_of(state.masks)
        if not self._first:  # the first interval compiles
            self._all_tokens += tokens
            self._all_seconds += seconds
        self.seconds_per_step = seconds / max(steps, 1)
        self._pending, self._last, self._first, self._since = [], step, False, time.monotonic()
        return result

    def check_finite(self, step: int) -> None:
        """Refuse to go on, and so to save, after a loss that is not finite."""
        if self._pending:
            self._require_finite(self._fetched()["loss"], step)

    def leave_out(self, seconds: float) -> None:
        """Leave `seconds` that were no training (a validation) out of the speed."""
        self._since += seconds

    @property
    def passes_at_once(self) -> int:
        """How many passes to dispatch together: one where nothing is known of their time and that matters."""
        most, seconds = self._plan.passes_per_dispatch, self.seconds_per_step / self._plan.accumulation_steps
        if math.isinf(self._plan.seconds_per_dispatch):
            return most
        return max(1, min(most, int(self._plan.seconds_per_dispatch / max(seconds, 1e-9))))

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over all intervals but the first."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0

    def _fetched(self) -> dict[str, np.ndarray]:
        """The metrics since the last log point, one entry a pass."""
        fetched = jax.device_get([metrics for metrics, _ in self._pending])
        counts = [count for _, count in self._pending]
        return {
            key: np.concatenate([metrics[key][:count] for metrics, count in zip(fetched, counts, strict=True)])
            for key in fetched[0]
        }

    def _require_finite(self, losses: np.ndarray, step: int) -> None:
        for i, loss in enumerate(losses):
            if not np.isfinite(loss):
                passes_back = len(losses) - 1 - i
                bad = step - passes_back // self._plan.accumulation_steps
                raise InputError(
                    f"the loss is {loss} at step {bad}; try a smaller training.learning_rate; the last checkpoint before it is kept"
                )
