"""One run, read top to bottom: data → model → adapters → optimizer → restore → loop → evaluation → export."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from jaxpeft.config import RunConfig
from jaxpeft.config.files import differences, directory_of, read_config, resolved, write_config
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar, log, set_quiet
from jaxpeft.report.metrics_log import MetricsLog
from jaxpeft.report.results import Results
from jaxpeft.runs.compilation_cache import enable_compilation_cache
from jaxpeft.runs.export import finalize, show
from jaxpeft.runs.setup import log_setup, setup_run
from jaxpeft.training import multihost
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.input_pipeline import feed
from jaxpeft.training.loop import Outcome, fit
from jaxpeft.training.preemption import stop_requests
from jaxpeft.training.step import TrainState, make_train_step
from jaxpeft.training.throughput import seconds_compiling


def run(config: RunConfig) -> Results:
    """Train, evaluate and export what `config` describes, in `output_dir/name`; return what was measured.

    Raises:
        InputError: for whatever in the configuration or its files cannot be done; nothing is overwritten.
        SystemExit: 128 + signal, after a checkpoint, where SIGTERM or Ctrl-C came.
    """
    _start(config)
    compiled_before = seconds_compiling()
    directory = directory_of(config)
    multihost.on_process_0(lambda: check_directory(config, directory))
    parts = setup_run(config)
    log_setup(parts)
    parallel, plan, frozen, judge = parts.parallel, parts.plan, parts.frozen, parts.judge

    multihost.on_process_0(lambda: make_directory(config, directory))
    multihost.check_shared(directory / "config.yaml")
    checkpoints = Checkpoints(directory / "checkpoints", parts.base_hash)
    state, progress = restored(config, checkpoints, parts.fresh_state())
    if progress.update:
        log(f"resumed after update {progress.update}")

    traces: Counter = Counter()
    norm = config.training.max_grad_norm
    train_step = make_train_step(
        parts.objective, parts.optimizer, traces, allocation=plan.allocation, max_grad_norm=norm
    )
    source = feed(parts.train_data, parallel)
    with (
        MetricsLog(directory, progress.update, writes=multihost.is_process_0()) as metrics_log,
        stop_requests() as requested,
        TrainingBar(progress.update, plan.num_steps) as bar,
        checkpoints.kept(),
    ):
        outcome = fit(
            state,
            frozen,
            plan,
            progress=progress,
            draw_at=source.draw_at,
            train_steps=source.train_steps(train_step, plan.passes_per_dispatch),
            validate=lambda state: judge.validate(frozen, state.adapters, state.masks),
            checkpoints=checkpoints,
            metrics_log=metrics_log,
            bar=bar,
            stop_requested=multihost.any_process(requested, parallel.largest),
            validate_start=None if progress.update else parts.validate_start,
        )
    if outcome.signal:
        _stop(config, directory, checkpoints, outcome)

    results = finalize(parts, outcome, checkpoints, traces, compiled_before=compiled_before)
    show(parts, results)
    return results


def _start(config: RunConfig) -> None:
    """Join the other processes, where there are any, before anything touches a device; and find what earlier runs compiled."""
    if config.distributed:
        log("joining the other hosts; jax gives up after five minutes")
        multihost.start(**vars(config.cluster))
    multihost.check_started()
    with multihost.all_or_none():
        enable_compilation_cache(config.compilation_cache, several_hosts=config.distributed)
    multihost.check_equal({"configuration": lambda: f"{resolved(config)} {config.resume}"})
    if not multihost.is_process_0():
        set_quiet()


def check_directory(config: RunConfig, directory: Path) -> None:
    """Refuse a directory that holds a run already; or, to resume, one that holds none, or one of another configuration.

    Raises:
        InputError: with the way out.
    """
    resume = f"--config {directory}/config.yaml --resume"
    if not config.resume:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(f"'{directory}' already holds a run; continue it with {resume}, or give another --name")
        return
    if not (directory / "config.yaml").is_file():
        raise InputError(
            f"nothing to resume in '{directory}'; start the run without --resume, or give the --name it had"
        )
    changed = differences(read_config(directory / "config.yaml"), config)
    if changed:
        raise InputError(
            f"'{directory}' was started with another configuration ({'; '.join(changed)}); resume with {resume}"
        )


def make_directory(config: RunConfig, directory: Path) -> None:
    """Make the run's directory, with its configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    write_config(config, directory / "config.yaml")


def restored(config: RunConfig, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, Progress]:
    """The newest checkpoint in the shape of `state`; or, where none is asked for or there is none, `state` itself.

    Raises:
        InputError: as `Checkpoints.restore`.
    """
    if not config.resume or checkpoints.latest is None:
        return state, Progress()
    return checkpoints.restore(state, checkpoints.latest)


def _stop(config: RunConfig, directory: Path, checkpoints: Checkpoints, outcome: Outcome) -> None:
    checkpoints.close()
    log(f"stopped by a signal; update {outcome.progress.update} is saved. Go on with:")
    log(f"  python train.py --config {directory}/config.yaml --resume{' --distributed' if config.distributed else ''}")
    assert outcome.signal is not None
    sys.exit(128 + outcome.signal)
