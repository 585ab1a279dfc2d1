"""Train several runs in one program, with one copy of base and data. They may differ only in values that the program reads as data.

Each run writes the same files as a run by itself, and can be resumed by itself. The dropout of a run must not depend on
the other runs, so all runs use threefry here. On a single accelerator, a run by itself uses the generator `rbg` instead
(`training/dropout.py`), so its dropout differs from the dropout here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import optax

from jaxpeft.adapters import Method
from jaxpeft.config import RunConfig
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar, log
from jaxpeft.report.metrics_log import MetricsLog
from jaxpeft.report.results import Results
from jaxpeft.runs.compilation_cache import enable_compilation_cache
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.export import finalize
from jaxpeft.runs.micro_batches import decide
from jaxpeft.runs.setup import RunSetup, log_setup, make_optimizer, setup_replica, setup_run
from jaxpeft.runs.sweep_key import SweepKey, check_shared_key
from jaxpeft.runs.train import create_directory, restored, run_state
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.loop import Outcome, RunState, fit
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.optimizer import learning_rate_schedule
from jaxpeft.training.preemption import stop_requests
from jaxpeft.training.step import TrainState
from jaxpeft.training.sweep import (
    STACKED,
    Replicas,
    Settings,
    make_sweep_step,
    settings_of,
    stack,
    sweep_input_pipeline,
)
from jaxpeft.training.throughput import seconds_compiling

_CPU_TOKENS = 256
"""Tokens per batch up to which runs are computed side by side on a CPU.

A larger batch keeps a CPU busy by itself: three runs of 16 x 128 tokens took 1.6 s each side by side, and 1.3 s one after the other.
"""


def run_together(configs: Sequence[RunConfig]) -> list[Results | InputError]:
    """Train, evaluate and export the runs of `configs` in one program.

    The runs may differ in name, seed, learning rate, pruning, initialisation and dropout, and for LoRA and HiRA in rank and alpha.

    Returns:
        for each run its results, or the error that ended it.

    Raises:
        InputError: the configurations differ in other keys, which the message names; or an error concerns all runs: in the data
            or the base, a directory that holds another run, or runs that stopped at different steps.
        SystemExit: 128 + signal, after SIGTERM or Ctrl-C. Each run has then saved a checkpoint.
    """
    keys = {config.run_name: SweepKey.of(config) for config in configs}
    if len(keys) < len(configs):
        raise InputError("two of these runs have the same name; give each its own name")
    check_shared_key(keys)
    enable_compilation_cache(configs[0].compilation_cache)
    compiled_before = seconds_compiling()
    for config in configs:
        RunDirectory.of(config).check(config.resolved(), resume=config.resume)
    first = _dense(setup_run(configs[0]))
    setups = [first, *(setup_replica(first, config) for config in configs[1:])]
    log_setup(first)
    log(f"trains {len(setups)} runs together: {', '.join(config.run_name for config in configs)}")
    for setup in setups:
        create_directory(setup)
    checkpoints = [Checkpoints(setup.directory.checkpoints, first.base_hash) for setup in setups]
    starts = [restored(setup, kept, initial_state(setup)) for setup, kept in zip(setups, checkpoints, strict=True)]
    steps = {progress.step for _, progress in starts}
    if len(steps) > 1:
        raise InputError(f"these runs stopped at different steps ({sorted(steps)}); resume them one by one")

    traces: Counter = Counter()
    replicas: Any = stacked(setups, [state for state, _ in starts])
    pipeline = sweep_input_pipeline([setup.train_data for setup in setups], first.parallel)

    @cache
    def train_steps(dense: bool, micro_batches: MicroBatches) -> Any:
        step: Any = make_step(setups, traces, dense=dense, micro_batches=micro_batches)
        return pipeline.train_steps(step, first.plan.micro_steps_per_dispatch)

    def compiled(micro_batches: MicroBatches) -> Any:
        dense = bool(first.plan.dense_steps)
        return train_steps(dense, micro_batches).compiled_for_longest(replicas, first.frozen)

    micro_batches, own = decide(
        configs[0].training,
        first.parallel,
        starts[0][1],
        first.train_data,
        compiled,
        model=first.model,
        trained=first.adapted.adapters,
        virtual_tokens=first.objective.virtual_tokens,
    )
    starts = [(state, replace(progress, micro_batch_tokens=own.micro_batch_tokens)) for state, progress in starts]
    with ExitStack() as logs, stop_requests() as requested:
        runs = [
            _entered(setup, state, progress, kept, logs)
            for setup, (state, progress), kept in zip(setups, starts, checkpoints, strict=True)
        ]
        with TrainingBar(steps.pop(), first.plan.num_steps) as bar:
            outcomes = fit(
                replicas,
                first.frozen,
                runs,
                draw_at=pipeline.draw_at,
                train_steps=train_steps(False, micro_batches),
                dense_train_steps=train_steps(True, micro_batches) if first.plan.dense_steps else None,
                bar=bar,
                stop_requested=requested,
                holding=STACKED,
            )
    signals = [outcome.signal for outcome in outcomes if isinstance(outcome, Outcome) and outcome.signal]
    if signals:
        for kept in checkpoints:
            kept.close()
        raise SystemExit(128 + signals[0])
    return [
        _finalized(setup, outcome, kept, traces, compiled_before, len(setups))
        for setup, outcome, kept in zip(setups, outcomes, checkpoints, strict=True)
    ]


def _dense(setup: RunSetup) -> RunSetup:
    """`setup` without flash attention, whose kernels cannot compute several runs at once."""
    objective = replace(setup.objective, flash=None)
    return replace(setup, objective=objective, evaluator=setup.evaluator.with_objective(objective))


def initial_state(setup: RunSetup) -> TrainState:
    """A run's state before its first step. Its key uses the only generator that can draw for many runs in one program."""
    return replace(setup.initial_state(), rng=setup.parallel.replicate(dropout_key(setup.config.seed)))


def stacked(setups: Sequence[RunSetup], states: Sequence[TrainState]) -> Replicas:
    """The runs of `setups` in their `states`, stacked on all devices."""
    # Placed on the devices like the program's own results. Otherwise the program would be compiled again for its second call.
    return setups[0].parallel.replicate(Replicas(stack(states), _settings(setups)[1]))


def make_step(
    setups: Sequence[RunSetup],
    traces: Counter | None = None,
    *,
    dense: bool = False,
    micro_batches: MicroBatches = WHOLE,
) -> Any:
    """The jitted step that trains the runs of `setups` together. A `dense` one leaves no channels of the base out."""
    first = setups[0]
    t = first.config.training
    method, _ = _settings(setups)

    def optimizer(learning_rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        schedule = learning_rate_schedule(learning_rate, first.plan.num_steps, first.plan.warmup_steps, t.schedule)
        return make_optimizer(t, first.method, first.model, schedule)

    objective = first.objective if method == first.adapted.method else replace(first.objective, method=method)
    return make_sweep_step(
        replace(objective, contextual=None) if dense else objective,
        optimizer,
        traces,
        allocation=first.plan.allocation,
        max_grad_norm=t.max_grad_norm,
        tokens_side_by_side=_CPU_TOKENS if first.parallel.device.platform == "cpu" else None,
        micro_batches=micro_batches,
    )


def _settings(setups: Sequence[RunSetup]) -> tuple[Method | None, Settings]:
    rates = [setup.config.training.learning_rate for setup in setups]
    return settings_of([setup.adapted.method for setup in setups], rates)


def _entered(
    setup: RunSetup, state: TrainState, progress: Progress, checkpoints: Checkpoints, logs: ExitStack
) -> RunState:
    directory = setup.directory
    metrics_log = logs.enter_context(MetricsLog(directory.metrics, directory.tensorboard, progress.step))
    logs.enter_context(checkpoints.kept())
    logs.enter_context(directory.in_use())
    return run_state(setup, state, progress, checkpoints, metrics_log)


def _finalized(
    setup: RunSetup,
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
        return finalize(setup, outcome, checkpoints, traces, compiled_before=compiled_before, trained_together=number)
    except InputError as error:
        return error
