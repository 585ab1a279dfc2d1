"""Several runs in one program: those that differ in what the program can read as data, with one copy of base and data.

Each leaves the files of a run done alone, and can be resumed alone. On a single accelerator a run alone draws its dropout with another
generator (`training/step.py`): there it sees other dropout than here, where every run must draw as if it were by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import jax
import optax

from jaxpeft.config import RunConfig
from jaxpeft.config.files import directory_of
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar, log
from jaxpeft.report.metrics_log import MetricsLog
from jaxpeft.report.results import Results
from jaxpeft.runs.compilation_cache import enable_compilation_cache
from jaxpeft.runs.export import finalize
from jaxpeft.runs.prepare import prepare_optimizer
from jaxpeft.runs.setup import RunSetup, log_setup, setup_replica, setup_run
from jaxpeft.runs.train import check_directory, make_directory, restored
from jaxpeft.training.checkpoint import Checkpoints
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.loop import Outcome
from jaxpeft.training.optimizer import learning_rate_schedule
from jaxpeft.training.preemption import stop_requests
from jaxpeft.training.step import TrainState
from jaxpeft.training.sweep import Replicas, make_sweep_step, settings_of, stack, sweep_input_pipeline
from jaxpeft.training.throughput import seconds_compiling
from jaxpeft.training.together import Run, fit_together

_CPU_TOKENS = 256
"""A CPU has enough to do with a batch of more: side by side, three runs of 16 x 128 tokens took 1.6 s each, one after the other 1.3 s."""


def run_together(configs: Sequence[RunConfig]) -> list[Results | InputError]:
    """Train, evaluate and export what `configs` describe, all of one `sweep_key`; return what each measured, or its failure.

    Raises:
        InputError: for what concerns all of them: data, base, a directory that holds another run, or runs at different updates.
        SystemExit: 128 + signal, after a checkpoint of each, where SIGTERM or Ctrl-C came.
    """
    enable_compilation_cache(configs[0].compilation_cache)
    compiled_before = seconds_compiling()
    directories = [directory_of(config) for config in configs]
    for config, directory in zip(configs, directories, strict=True):
        check_directory(config, directory)
    first = _dense(setup_run(configs[0]))
    runs = [first, *(setup_replica(first, config) for config in configs[1:])]
    log_setup(first)
    log(f"trains {len(runs)} runs together: {', '.join(config.run_name for config in configs)}")
    for config, directory in zip(configs, directories, strict=True):
        make_directory(config, directory)
    checkpoints = [Checkpoints(directory / "checkpoints", first.base_hash) for directory in directories]
    starts = [restored(parts.config, kept, fresh_state(parts)) for parts, kept in zip(runs, checkpoints, strict=True)]
    updates = {progress.update for _, progress in starts}
    if len(updates) > 1:
        raise InputError(f"these runs stopped at different updates ({sorted(updates)}); resume them apart")

    traces: Counter = Counter()
    replicas, step = assemble(runs, [state for state, _ in starts], traces)
    source = sweep_input_pipeline([parts.train_data for parts in runs], first.parallel)
    train_steps: Any = source.train_steps(step, first.plan.passes_per_dispatch)
    with ExitStack() as stack_of_logs, stop_requests() as requested:
        entered = [
            _entered(parts, own, progress, kept, stack_of_logs)
            for parts, (own, progress), kept in zip(runs, starts, checkpoints, strict=True)
        ]
        with TrainingBar(updates.pop(), first.plan.num_steps) as bar:
            outcomes = fit_together(
                replicas,
                first.frozen,
                entered,
                draw_at=source.draw_at,
                train_steps=train_steps,
                bar=bar,
                stop_requested=requested,
            )
    signals = [outcome.signal for outcome in outcomes if isinstance(outcome, Outcome) and outcome.signal]
    if signals:
        for kept in checkpoints:
            kept.close()
        raise SystemExit(128 + signals[0])
    return [
        _concluded(parts, outcome, kept, traces, compiled_before, len(runs))
        for parts, outcome, kept in zip(runs, outcomes, checkpoints, strict=True)
    ]


def _dense(parts: RunSetup) -> RunSetup:
    """Without flash attention, whose kernels have no axis of runs."""
    objective = replace(parts.objective, flash=None)
    return replace(parts, objective=objective, judge=parts.judge.of(objective))


def fresh_state(parts: RunSetup) -> TrainState:
    """A run's state before its first update, drawing dropout in the one way that many runs can draw it in one program."""
    return replace(parts.fresh_state(), rng=parts.parallel.replicate(dropout_key(parts.config.seed)))


def assemble(
    runs: Sequence[RunSetup], states: Sequence[TrainState], traces: Counter | None = None
) -> tuple[Replicas, Any]:
    """The members that `runs` in their `states` are, and the step that trains them."""
    first = runs[0]
    t = first.config.training
    rates = [parts.config.training.learning_rate for parts in runs]
    method, settings = settings_of([parts.adapted.method for parts in runs], rates)

    def optimizer(learning_rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        schedule = learning_rate_schedule(learning_rate, first.plan.num_steps, t.warmup_steps, t.schedule)
        return prepare_optimizer(first.config, first.model, schedule)

    objective = first.objective if method == first.adapted.method else replace(first.objective, method=method)
    step = make_sweep_step(
        objective,
        optimizer,
        traces,
        allocation=first.plan.allocation,
        max_grad_norm=t.max_grad_norm,
        tokens_side_by_side=_CPU_TOKENS if first.parallel.device.platform == "cpu" else None,
    )
    # Placed as the program gives them back: settings left where numpy has them would have it compiled a second time.
    return first.parallel.replicate(Replicas(stack(states), settings)), step


def _entered(parts: RunSetup, own: TrainState, progress: Any, checkpoints: Checkpoints, logs: ExitStack) -> Run:
    metrics_log = logs.enter_context(MetricsLog(directory_of(parts.config), progress.update))
    logs.enter_context(checkpoints.kept())

    def validate(state: TrainState) -> dict[str, float]:
        return parts.judge.validate(parts.frozen, state.adapters, state.masks)

    start = None if progress.update else parts.validate_start
    return Run(parts.plan, progress, own, validate, checkpoints, metrics_log, validate_start=start)


def _concluded(
    parts: RunSetup,
    outcome: Outcome | InputError,
    checkpoints: Checkpoints,
    traces: Counter,
    compiled_before: float,
    number: int,
) -> Results | InputError:
    if isinstance(outcome, InputError):
        checkpoints.close()
        return outcome
    try:
        return finalize(parts, outcome, checkpoints, traces, compiled_before=compiled_before, trained_together=number)
    except InputError as error:
        return error
