"""One run, read top to bottom: data → model → adapters → optimizer → restore → loop → evaluation → export."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from jaxpeft.compilation import keep_programs
from jaxpeft.conclusion import conclude, show
from jaxpeft.config import RunConfig
from jaxpeft.config_file import differences, directory_of, read_config, resolved, write_config
from jaxpeft.errors import InputError
from jaxpeft.parts import announce, prepare_parts
from jaxpeft.report.log import MetricsLog
from jaxpeft.report.results import Results
from jaxpeft.report.terminal import TrainingBar, say, silence
from jaxpeft.training import processes
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.feed import feed
from jaxpeft.training.interrupt import stop_requests
from jaxpeft.training.loop import Outcome, fit
from jaxpeft.training.meter import seconds_compiling
from jaxpeft.training.step import TrainState, make_train_step


def run(config: RunConfig) -> Results:
    """Train, evaluate and export what `config` describes, in `output_dir/name`; return what was measured.

    Raises:
        InputError: for whatever in the configuration or its files cannot be done; nothing is overwritten.
        SystemExit: 128 + signal, after a checkpoint, where SIGTERM or Ctrl-C came.
    """
    _start(config)
    compiled_before = seconds_compiling()
    directory = directory_of(config)
    processes.by_first(lambda: check_directory(config, directory))
    parts = prepare_parts(config)
    announce(parts)
    parallel, plan, frozen, judge = parts.parallel, parts.plan, parts.frozen, parts.judge

    processes.by_first(lambda: make_directory(config, directory))
    processes.check_shared(directory / "config.yaml")
    checkpoints = Checkpoints(directory / "checkpoints", parts.base_hash)
    state, progress = restored(config, checkpoints, parts.fresh_state())
    if progress.update:
        say(f"resumed after update {progress.update}")

    traces: Counter = Counter()
    norm = config.training.max_grad_norm
    train_step = make_train_step(
        parts.objective, parts.optimizer, traces, allocation=plan.allocation, max_grad_norm=norm
    )
    source = feed(parts.train_data, parallel)
    with (
        MetricsLog(directory, progress.update, writes=processes.is_first()) as log,
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
            log=log,
            bar=bar,
            stop_requested=processes.agreed(requested, parallel.largest),
            validate_start=None if progress.update else parts.validate_start,
        )
    if outcome.signal:
        _stop(config, directory, checkpoints, outcome)

    results = conclude(parts, outcome, checkpoints, traces, compiled_before=compiled_before)
    show(parts, results)
    return results


def _start(config: RunConfig) -> None:
    """Join the other processes, where there are any, before anything touches a device; and find what earlier runs compiled."""
    if config.distributed:
        say("joining the other hosts; jax gives up after five minutes")
        processes.start(**vars(config.cluster))
    processes.check_started()
    with processes.all_or_none():
        keep_programs(config.compilation_cache, several_hosts=config.distributed)
    processes.check_equal({"configuration": lambda: f"{resolved(config)} {config.resume}"})
    if not processes.is_first():
        silence()


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
    say(f"stopped by a signal; update {outcome.progress.update} is saved. Go on with:")
    say(f"  python train.py --config {directory}/config.yaml --resume{' --distributed' if config.distributed else ''}")
    assert outcome.signal is not None
    sys.exit(128 + outcome.signal)
