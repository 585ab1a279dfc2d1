"""The training loop: micro-steps, pruning, logging, validation, checkpoints and stop signals, in one call from first to last step.

The loop trains a list of runs that share a program; a run by itself is a list of one. Several micro-steps are dispatched at a
time. Between two log points nothing leaves the devices, and one dispatch is queued behind the one that runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.masks import churn, sparsity_of
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.pruning.schedules import Schedule
from jaxpeft.tasks.metrics import score
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.input_pipeline import Draw, Prefetched
from jaxpeft.training.plan import Plan
from jaxpeft.training.step import Metrics, TrainState, allocate_step, prune_step
from jaxpeft.training.throughput import ThroughputMeter, first_bad_step
from jaxpeft.trees import Layers, Params


class Log(Protocol):
    """Takes the measurements (`report.metrics_log.MetricsLog`)."""

    def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
        """Record `metrics` of `split` after `step`."""


class SparsityLog(Protocol):
    """Takes the masks when they change (`report.sparsity_log.SparsityLog`)."""

    def write(self, step: int, masks: Layers, before: Layers) -> None:
        """Record the `masks` after `step`, and their changes since `before`."""


class Bar(Protocol):
    """Shows the progress (`report.console.TrainingBar`)."""

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""

    def show(self, step: int, *, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show the figures of a log interval."""


@dataclass(frozen=True)
class Outcome:
    """The end of a run.

    Attributes:
        state: the training state after the last step.
        progress: the steps done, the best validation and the time so far.
        tokens_per_second: real tokens per second, as the throughput meter counts them.
        seconds_per_step: seconds per step, over the same intervals.
        signal: the number of the signal that stopped the run, or None.
    """

    state: TrainState
    progress: Progress
    tokens_per_second: float
    seconds_per_step: float
    signal: int | None = None


@dataclass
class RunState:
    """One run in the loop.

    Attributes:
        plan: when the run logs, validates, prunes and saves.
        progress: its progress as of the last event.
        state: its state as of the last event that needed it, shaped as in its checkpoints.
        validate: state → validation metrics.
        checkpoints: the run's checkpoints.
        metrics_log: the run's log of metrics.
        validate_start: measures the initial adapters. It is called after the first event, so that training need not wait for it.
        outcome: the end of the run, or the error that ended it; None while it trains.
        sparsity_log: the run's log of masks, written when its masks change; None: no log.
        redraw: `(state, step) → state`, redraws the entries of a sparse update; needed if its schedule is a `Redraw`.
    """

    plan: Plan
    progress: Progress
    state: TrainState
    validate: Callable[[TrainState], dict[str, float]]
    checkpoints: Checkpoints
    metrics_log: Log
    validate_start: Callable[[], dict[str, float]] | None = None
    outcome: Outcome | InputError | None = None
    sparsity_log: SparsityLog | None = None
    redraw: Callable[[TrainState, int], TrainState] | None = None

    @property
    def has_ended(self) -> bool:
        """True if nothing is left to do: the plan is done, patience has run out, or there was an error."""
        # Patience is checked here, not after a validation, because a run that stopped early must also end at once if resumed.
        patience = self.plan.patience
        stopped = bool(patience and self.progress.since_best >= patience)
        return self.outcome is not None or stopped or self.progress.step >= self.plan.num_steps


@dataclass(frozen=True)
class Holding:
    """Functions on the states that a program holds: one state (`ALONE`), or several stacked (`training.sweep.STACKED`).

    Attributes:
        prune: `(held, runs, step) → held`; prunes every run whose schedule prunes after `step`.
        states: `(held, runs) →` the state of each run.
        has_masks: `held →` whether any of them has masks, which a log line needs.
    """

    prune: Callable[[Any, Sequence[RunState], int], Any]
    states: Callable[[Any, Sequence[RunState]], list[TrainState]]
    has_masks: Callable[[Any], bool]


def fit(
    held: Any,
    frozen: Params,
    runs: Sequence[RunState],
    *,
    draw_at: Callable[[int], Draw],
    train_steps: Callable[[Any, Params, list[Draw]], tuple[Any, Metrics]],
    bar: Bar,
    stop_requested: Callable[[], int | None],
    holding: Holding | None = None,
    dense_train_steps: Callable[[Any, Params, list[Draw]], tuple[Any, Metrics]] | None = None,
) -> list[Outcome | InputError]:
    """Train all `runs` to their ends or, if a stop signal comes, to that signal with a checkpoint of each run.

    If the loss of a run is not finite, the run ends with an error and saves nothing more, and the other runs continue. They
    also continue if a run stops early. The program still computes a run that has ended, but its results are ignored.

    Args:
        held: the states of the runs, in the form of `holding`; donated.
        frozen: the base's parameters.
        runs: the runs, all at the same step.
        draw_at: micro-step → draw, a pure function, so that a resumed run sees the same batches as without the interruption.
        train_steps: dispatches one micro-step for each draw.
        bar: shows the progress.
        stop_requested: returns the number of a stop signal, or None.
        holding: the form of `held`; None: `ALONE`.
        dense_train_steps: dispatches the first steps of the plan (`Plan.dense_steps`); None: `train_steps` does.

    Returns:
        for each run its `Outcome`, with `signal` set after a stop signal, or the error that ended it.
    """
    holding = holding or ALONE
    plan, step = runs[0].plan, runs[0].progress.step
    assert {run.progress.step for run in runs} == {step}, "runs that train together are at the same step"
    meter, size, started = ThroughputMeter(step), plan.accumulation_steps, time.monotonic()
    before = [run.progress.seconds for run in runs]
    if step == 0:
        held = _prune(holding, held, runs, step)
    micro_steps, depth = range(step * size, plan.num_steps * size), 2 * plan.micro_steps_per_dispatch
    dense_train_steps = dense_train_steps or train_steps
    with Prefetched(draw_at, micro_steps, depth=depth) as prefetched:
        while step < plan.num_steps and not all(run.has_ended for run in runs):
            held, step, signal = train_until(
                min(run.plan.next_event(step) for run in runs),
                held,
                frozen,
                plan,
                step=step,
                prefetched=prefetched,
                train_steps=dense_train_steps if step < plan.dense_steps else train_steps,
                meter=meter,
                bar=bar,
                stop_requested=stop_requested,
            )
            held = _prune(holding, held, runs, step)
            ends = step == plan.num_steps or bool(signal)
            logs, validates = plan.logs_at(step) or ends, plan.validates_at(step) or step == plan.num_steps
            if logs or validates:
                _end_what_is_not_finite(runs, meter, step)
            # A log line needs only the masks of a state. If there are none, the states need not be fetched.
            if validates or ends or holding.has_masks(held):
                _take_states(runs, holding.states(held, runs))
            if logs:
                _report(runs, meter, step, bar)
            paused = time.monotonic()
            if not signal:  # after a signal the process must end soon
                _validate_starts(runs)
            for run, seconds in zip(runs, before, strict=True):
                if not run.has_ended:
                    run.progress = replace(run.progress, step=step, seconds=seconds + time.monotonic() - started)
                    _save(run, validates, signal)
                    if signal or run.has_ended:
                        run.outcome = Outcome(run.state, run.progress, 0.0, 0.0, signal)
            meter.leave_out(time.monotonic() - paused)
            if signal:
                break
    speeds = np.broadcast_to(meter.tokens_per_second, len(runs))
    return [_ended(run, float(speed), meter) for run, speed in zip(runs, speeds, strict=True)]


def train_until(
    until: int,
    held: Any,
    frozen: Params,
    plan: Plan,
    *,
    step: int,
    prefetched: Prefetched,
    train_steps: Callable[[Any, Params, list[Draw]], tuple[Any, Metrics]],
    meter: ThroughputMeter,
    bar: Bar,
    stop_requested: Callable[[], int | None],
) -> tuple[Any, int, int | None]:
    """Dispatch the micro-steps from `step` to the step `until`, or fewer if a stop signal comes.

    Returns:
        the states, the step reached, and the number of the signal or None.
    """
    done, size, signal = step * plan.accumulation_steps, plan.accumulation_steps, None
    while done < until * size and not signal:
        most = plan.up_to_whole_steps(done, plan.micro_steps_at_once(meter.seconds_per_step))
        draws = prefetched.take(min(until * size - done, most))
        held, metrics = train_steps(held, frozen, draws)
        meter.add(metrics, len(draws))
        done += len(draws)
        if done % size == 0:
            step = done // size
            bar.advance(step)
            signal = stop_requested()
    return held, step, signal


def _prune_alone(state: TrainState, runs: Sequence[RunState], step: int) -> TrainState:
    (run,) = runs
    schedule = run.plan.pruning
    if schedule is None or not schedule.due(step):
        return state
    if isinstance(schedule, Redraw):
        assert run.redraw is not None, "a run whose entries are redrawn needs the function that does it"
        return run.redraw(state, step)
    sites = state.adapters["sites"]
    if isinstance(schedule, Allocation):
        return allocate_step(state, schedule.budget_at(step, len(sites)), step == schedule.last_step)
    pruner = run.plan.pruner
    counts, numbers = pruner.selection.counts(sites, schedule.sparsity_at(step)), schedule.numbers_at(step)
    return prune_step(state, counts, numbers, pruner=pruner, change=schedule.change_at(step))


def _prune(holding: Holding, held: Any, runs: Sequence[RunState], step: int) -> Any:
    """Prune the runs whose schedule acts after `step`, and record what changed."""
    acting = [run.plan.prunes_at(step) and not run.has_ended for run in runs]
    if not any(acting):
        return holding.prune(held, runs, step)
    before = [state.masks for state in holding.states(held, runs)]
    held = holding.prune(held, runs, step)
    after = [state.masks for state in holding.states(held, runs)]
    for run, acts, old, new in zip(runs, acting, before, after, strict=True):
        if acts and isinstance(run.plan.pruning, Schedule) and run.plan.pruning.changes_masks_at(step):
            run.metrics_log.write(step, "pruning", {**_sparsity(run, new), "mask_churn": churn(old, new)})
            if run.sparsity_log:
                run.sparsity_log.write(step, new, old)
    return held


ALONE = Holding(prune=_prune_alone, states=lambda state, runs: [state], has_masks=lambda state: bool(state.masks))
"""The form for a single run: its state itself."""


def _take_states(runs: Sequence[RunState], states: Sequence[TrainState]) -> None:
    for run, state in zip(runs, states, strict=True):
        if not run.has_ended:
            run.state = state


def _end_what_is_not_finite(runs: Sequence[RunState], meter: ThroughputMeter, step: int) -> None:
    losses = meter.pending().get("loss")
    for i, run in enumerate(runs):
        if losses is not None and not run.has_ended:
            run.outcome = _not_finite(losses.reshape(len(losses), -1)[:, i], step, run.plan)


def _not_finite(losses: np.ndarray, step: int, plan: Plan) -> InputError | None:
    """The error of a run whose `losses: [micro-steps]`, the last of `step`, are not all finite; None if they are."""
    bad = first_bad_step(losses, step, plan.accumulation_steps)
    if bad is None:
        return None
    loss = losses[~np.isfinite(losses)][0]
    return InputError(
        f"the loss is {loss} at step {bad}; try a smaller training.learning_rate; a checkpoint before it, if there is one, is kept"
    )


def _report(runs: Sequence[RunState], meter: ThroughputMeter, step: int, bar: Bar) -> None:
    means = {name: np.reshape(values, -1) for name, values in meter.flush(step).items()}
    for i, run in enumerate(runs):
        if not run.has_ended:
            own = {name: float(values[i]) for name, values in means.items()}
            run.metrics_log.write(step, "train", {**own, **_figures(run, step)})
    going = [i for i, run in enumerate(runs) if not run.has_ended]
    if going:
        left = (runs[0].plan.num_steps - step) * meter.seconds_per_step
        speed = float(means["tokens_per_second"].sum())
        bar.show(step, loss=float(means["loss"][going].mean()), tokens_per_second=speed, seconds_left=left)


def _figures(run: RunState, step: int) -> dict[str, float]:
    """The figures of a log line besides the metrics of micro-steps: the learning rate and, if there are masks, the sparsity."""
    return {**_sparsity(run, run.state.masks), "learning_rate": float(run.plan.learning_rate(step - 1))}


def _sparsity(run: RunState, masks: Layers) -> dict[str, float]:
    """The sparsity of a log line; {} if there are no masks, or if they only hold the indices of a sparse update."""
    return {} if not masks or isinstance(run.plan.pruning, Redraw) else {"sparsity": sparsity_of(masks)}


def _validate_starts(runs: Sequence[RunState]) -> None:
    for run in runs:
        if run.validate_start and not run.has_ended:
            run.metrics_log.write(0, "validation", run.validate_start())
        run.validate_start = None


def _save(run: RunState, validates: bool, signal: int | None) -> None:
    if validates:
        run.progress = _validated(run)
    elif signal:
        run.checkpoints.save(run.state, run.progress)


def _validated(run: RunState) -> Progress:
    """Validate and save the run, and return its progress, which names the best adapter so far."""
    progress, plan = run.progress, run.plan
    metrics = run.validate(run.state)
    run.metrics_log.write(progress.step, "validation", metrics)
    value = score(metrics, plan.metric)
    if plan.may_be_best(progress.step):
        # Every number is better than no score. NaN is not, because it compares as false.
        if value > (-math.inf if progress.best_score is None else progress.best_score):
            progress = replace(progress, best_step=progress.step, best_score=value, since_best=0)
        else:
            progress = replace(progress, since_best=progress.since_best + 1)
    run.checkpoints.save(run.state, progress)
    return progress


def _ended(run: RunState, tokens_per_second: float, meter: ThroughputMeter) -> Outcome | InputError:
    if isinstance(run.outcome, InputError):
        return run.outcome
    outcome = run.outcome or Outcome(run.state, run.progress, 0.0, 0.0)  # a resumed run may have had nothing left to do
    return replace(outcome, tokens_per_second=tokens_per_second, seconds_per_step=meter.mean_seconds_per_step)
