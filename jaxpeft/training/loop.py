"""The training loop: passes, pruning, logging, validation, checkpoints, stopping. One call from first update to last."""

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
from jaxpeft.training.metrics import score
from jaxpeft.training.objectives import Batch
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import TrainState, TrainStep, allocate_step, prune_step


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

    `patience` None never stops early.
    """

    num_steps: int
    accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    metric: str
    learning_rate: Callable[[int], float]
    pruning: Schedule | Allocation | None = None
    patience: int | None = None

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
    batch_at: Callable[[int], Batch],
    train_step: TrainStep,
    validate: Callable[[TrainState], dict[str, float]],
    checkpoints: Checkpoints,
    parallel: DataParallel,
    log: Log,
    bar: Bar,
    stop_requested: Callable[[], int | None],
) -> Outcome:
    """Train from `progress.update` to the plan's end, or to an early stop, or to a signal (with a checkpoint).

    `batch_at` is a pure function of the pass, so that a resumed run sees the batches it would have seen.

    Raises:
        InputError: for a loss that is not finite, with its step; nothing is saved after it.
    """
    meter = _Meter(plan, progress.update)
    started, seconds_before = time.monotonic(), progress.seconds
    for step in range(progress.update + 1, plan.num_steps + 1):
        # Here, not after a validation: a run that has stopped early and is resumed has nothing left to do either.
        if plan.patience and progress.since_best >= plan.patience:
            break
        for i in range(plan.accumulation_steps):
            batch = batch_at((step - 1) * plan.accumulation_steps + i)
            state, metrics = train_step(state, frozen, parallel.shard(dict(batch)))
            meter.add(metrics, batch)
        if plan.pruning and plan.pruning.due(step):
            state = _pruned(state, plan.pruning, step)
        bar.advance(step)
        number, last = stop_requested(), step == plan.num_steps
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
        self._pending: list[dict[str, jax.Array]] = []
        self._tokens = self._all_tokens = 0
        self._all_seconds, self._all_steps = 0.0, 0
        self._since, self._last = time.monotonic(), start
        self._first = True

    def add(self, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Take in one pass, without waiting for it."""
        self._pending.append(metrics)
        self._tokens += int(np.sum(batch["attention_mask"]))

    def flush(self, step: int, state: TrainState) -> dict[str, float]:
        """Wait for the passes since the last log point; return their means."""
        values = jax.device_get(self._pending)
        self._require_finite([float(v["loss"]) for v in values], step)
        seconds = time.monotonic() - self._since
        result = {key: float(np.mean([v[key] for v in values])) for key in values[0]} if values else {}
        result["tokens_per_second"] = self._tokens / max(seconds, 1e-9)
        if state.masks:
            result["sparsity"] = sparsity_of(state.masks)
        if not self._first:  # the first interval compiles
            self._all_tokens += self._tokens
            self._all_seconds += seconds
            self._all_steps += step - self._last
        self._seconds_per_step = seconds / max(step - self._last, 1)
        self._pending, self._tokens, self._last, self._first = [], 0, step, False
        self._since = time.monotonic()
        return result

    def check_finite(self, step: int) -> None:
        """Refuse to go on, and so to save, after a loss that is not finite."""
        self._require_finite([float(v["loss"]) for v in jax.device_get(self._pending)], step)

    def leave_out(self, seconds: float) -> None:
        """Leave `seconds` that were no training (a validation) out of the speed."""
        self._since += seconds

    @property
    def seconds_per_step(self) -> float:
        """Of the newest log interval."""
        return self._seconds_per_step

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over all intervals but the first."""
        return self._all_tokens / self._all_seconds if self._all_seconds else 0.0

    def _require_finite(self, losses: list[float], step: int) -> None:
        for i, loss in enumerate(losses):
            if not np.isfinite(loss):
                passes_back = len(losses) - 1 - i
                bad = step - passes_back // self._plan.accumulation_steps
                raise InputError(
                    f"the loss is {loss} at step {bad}; try a smaller training.learning_rate; the last checkpoint before it is kept"
                )
