"""One run, read from top to bottom: set up, restore, train, evaluate and export."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

from jaxpeft.config import RunConfig
from jaxpeft.errors import InputError
from jaxpeft.pruning import Schedule
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.report.console import TrainingBar, log, set_quiet
from jaxpeft.report.metrics_log import MetricsLog
from jaxpeft.report.results import Results
from jaxpeft.report.sparsity_log import SparsityLog
from jaxpeft.runs.compilation_cache import enable_compilation_cache
from jaxpeft.runs.contextual import save_estimators
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.export import finalize, show
from jaxpeft.runs.micro_batches import decide
from jaxpeft.runs.setup import RunSetup, log_setup, setup_run
from jaxpeft.training import multihost
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.input_pipeline import InputPipeline, TrainProgram, make_input_pipeline
from jaxpeft.training.loop import Log, Outcome, RunState, fit
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.preemption import stop_requests
from jaxpeft.training.redraw import Redrawing, make_redrawing
from jaxpeft.training.step import TrainState, make_train_step
from jaxpeft.training.throughput import seconds_compiling
from jaxpeft.trees import ESTIMATORS


def run(config: RunConfig) -> Results:
    """Train, evaluate and export the run of `config` in `output_dir/name`, and return its results.

    Raises:
        InputError: the configuration or its files are invalid, or the directory holds another run. Nothing is overwritten.
        SystemExit: 128 + signal, after SIGTERM or Ctrl-C. A checkpoint has then been saved.
    """
    if config.distributed:
        log("joining the other hosts; jax gives up after five minutes")
        multihost.start(**vars(config.cluster))
    _start(config.compilation_cache, several_hosts=config.distributed)
    multihost.check_equal({"configuration": lambda: f"{config.resolved()} {config.resume}"})
    compiled_before = seconds_compiling()
    directory = RunDirectory.of(config)
    multihost.on_process_0(lambda: directory.check(config.resolved(), resume=config.resume))
    setup = setup_run(config)
    log_setup(setup)
    multihost.on_process_0(lambda: create_directory(setup))
    multihost.check_shared(directory.config)

    checkpoints = Checkpoints(directory.checkpoints, setup.base_hash)
    state, progress = restored(setup, checkpoints, setup.initial_state())
    if progress.step:
        log(f"resumed after step {progress.step}")
    traces: Counter = Counter()
    pipeline = make_input_pipeline(setup.train_data, setup.parallel)

    @cache
    def train_steps(dense: bool, micro_batches: MicroBatches) -> TrainProgram:
        step = make_train_step(
            replace(setup.objective, contextual=None) if dense else setup.objective,
            setup.optimizer,
            traces,
            allocation=setup.plan.allocation,
            max_grad_norm=config.training.max_grad_norm,
            micro_batches=micro_batches,
        )
        return pipeline.train_steps(step, setup.plan.micro_steps_per_dispatch)

    def compiled(micro_batches: MicroBatches) -> Any:
        dense = bool(setup.plan.dense_steps)  # it needs more memory than the steps with contextual sparsity
        return train_steps(dense, micro_batches).compiled_for_longest(state, setup.frozen)

    micro_batches, progress = decide(
        config.training,
        setup.parallel,
        progress,
        setup.train_data,
        compiled,
        model=setup.model,
        trained=setup.adapted.adapters,
        virtual_tokens=setup.objective.virtual_tokens,
    )

    with (
        MetricsLog(
            directory.metrics, directory.tensorboard, progress.step, writes=multihost.is_process_0()
        ) as metrics_log,
        stop_requests() as requested,
        directory.in_use() if multihost.is_process_0() else nullcontext(),
        TrainingBar(progress.step, setup.plan.num_steps) as bar,
        checkpoints.kept(),
    ):
        (outcome,) = fit(
            state,
            setup.frozen,
            [
                run_state(
                    setup,
                    state,
                    progress,
                    checkpoints,
                    metrics_log,
                    redraw=redrawing(setup, pipeline, micro_batches),
                    writes=multihost.is_process_0(),
                )
            ],
            draw_at=pipeline.draw_at,
            train_steps=train_steps(False, micro_batches),
            dense_train_steps=train_steps(True, micro_batches) if setup.plan.dense_steps else None,
            bar=bar,
            stop_requested=multihost.any_process(requested, setup.parallel.largest),
        )
        if isinstance(outcome, InputError):
            raise outcome
    if outcome.signal:
        _stop(setup, checkpoints, outcome)

    results = finalize(setup, outcome, checkpoints, traces, compiled_before=compiled_before)
    show(setup, results)
    return results


def run_state(
    setup: RunSetup,
    state: TrainState,
    progress: Progress,
    checkpoints: Checkpoints,
    metrics_log: Log,
    *,
    redraw: Redrawing | None = None,
    writes: bool = True,
) -> RunState:
    """The run as the training loop takes it, from `state` and `progress` on. With several processes, only one of them `writes`.

    `redraw` is needed if the plan redraws the entries of a sparse update (`redrawing`).
    """
    pruned = isinstance(setup.plan.pruning, Schedule)
    return RunState(
        setup.plan,
        progress,
        state,
        validate=lambda state: setup.evaluator.validate(setup.frozen, state.adapters, state.masks),
        checkpoints=checkpoints,
        metrics_log=metrics_log,
        sparsity_log=SparsityLog(setup.directory.sparsity, progress.step, writes=writes) if pruned else None,
        validate_start=None if progress.step else setup.validate_start,
        redraw=redraw,
    )


def redrawing(setup: RunSetup, pipeline: InputPipeline, micro_batches: MicroBatches = WHOLE) -> Redrawing | None:
    """Redraws the entries of the run's sparse update, if its plan does so; `pipeline` is the source of its batches."""
    plan = setup.plan
    if not isinstance(plan.pruning, Redraw):
        return None
    return make_redrawing(
        setup.objective,
        setup.frozen,
        pipeline,
        plan.pruning,
        accumulation_steps=plan.accumulation_steps,
        micro_batches=micro_batches,
    )


def create_directory(setup: RunSetup) -> None:
    """Create the run's directory, with everything that a resumed run reads from it."""
    if setup.directory.has_nothing_to_keep:
        log(f"the run in {setup.directory} ended before its first checkpoint, so it starts anew")
    setup.directory.create(setup.config.resolved())
    save_estimators(setup.frozen.get(ESTIMATORS, {}), setup.directory)


def restored(setup: RunSetup, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, Progress]:
    """The newest checkpoint, shaped like `state`, if the run is resumed and has one. Else `state` itself and no progress.

    Raises:
        InputError: as `Checkpoints.restore`.
    """
    if not setup.config.resume or checkpoints.latest is None:
        return state, Progress()
    return checkpoints.restore(state, checkpoints.latest)


def _start(compilation_cache: str | None, *, several_hosts: bool) -> None:
    """Prepare the process before anything touches a device: check the other processes, and enable the compilation cache."""
    multihost.check_started()
    with multihost.all_or_none():
        enable_compilation_cache(compilation_cache, several_hosts=several_hosts)
    if not multihost.is_process_0():
        set_quiet()


def _stop(setup: RunSetup, checkpoints: Checkpoints, outcome: Outcome) -> None:
    checkpoints.close()
    log(f"stopped by a signal; step {outcome.progress.step} is saved. Go on with:")
    distributed = " --distributed" if setup.config.distributed else ""
    log(f"  python train.py {setup.directory.resume_flags}{distributed}")
    assert outcome.signal is not None
    sys.exit(128 + outcome.signal)
