"""A process that does one job of a comparison, so that each job has its own memory and a crash ends no other job.

    python -m jaxpeft.comparison.worker < JOB

A job is JSON: `{"do": "train", "runs": [a run's configuration, …], "resume": […], "by_itself": …}`, or `{"do": "forgetting",
"runs": [directories], "head": the run that trains a masked-LM head if the base has none, "resume": …, "settings":
ForgettingConfig}`. The reason of a run's failure is written to the run's directory. The exit status is 0; 1 if several runs
failed as a whole, in which case nothing is written; and 128 + signal if a signal stopped the process.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxpeft.config import DataConfig, RunConfig
from jaxpeft.config.files import run_config
from jaxpeft.errors import InputError
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.sweep_key import sweep_key


def main() -> None:
    """Do the job on standard input, and exit with its status."""
    sys.exit(do(json.load(sys.stdin)))


def do(job: dict[str, Any]) -> int:
    """Do a job and return its exit status: 0, or 1 if several runs failed as a whole."""
    arguments = {key: value for key, value in job.items() if key != "do"}
    kinds: dict[str, Callable[..., int]] = {"train": _train, "forgetting": _forgetting}
    return kinds[job["do"]](**arguments)


def _train(runs: list[dict[str, Any]], resume: list[bool], by_itself: bool) -> int:
    configs = [_config(values, again) for values, again in zip(runs, resume, strict=True)]

    def train() -> None:
        # A run that may share a program is trained by `run_together` even if it is the only one left. So its result does not
        # depend on which other runs were left.
        if by_itself or sweep_key(configs[0]) is None:
            from jaxpeft.runs.train import run

            run(*configs)
            return
        from jaxpeft.runs.sweep import run_together

        for config, outcome in zip(configs, run_together(configs), strict=True):
            if isinstance(outcome, InputError):
                _write_failure(RunDirectory.of(config), str(outcome))

    failed = _attempt(train)
    if failed and len(configs) == 1:
        _write_failure(RunDirectory.of(configs[0]), failed)
    return int(failed is not None and len(configs) > 1)


def _config(values: dict[str, Any], resume: bool) -> RunConfig:
    return replace(run_config(values, values["name"]), resume=resume)


def _write_failure(directory: RunDirectory, failure: str) -> None:
    directory.path.mkdir(parents=True, exist_ok=True)
    directory.failure.write_text(failure)


def _forgetting(runs: list[str], head: dict[str, Any], resume: bool, settings: dict[str, Any]) -> int:
    from jaxpeft.comparison import forgetting

    config, found = _config(head, resume), []
    failed = _attempt(lambda: found.append(forgetting.head_for(config)))
    if failed:
        for run in map(Path, runs):
            RunDirectory(run).forgetting_failure.write_text(f"its masked-LM head, {config.run_name}: {failed}")
        return 0
    # The base is measured once for all runs that have it and their seed.
    groups: dict[str, list[RunDirectory]] = {}

    def to_its_group(directory: RunDirectory) -> None:
        of = directory.read_config()
        groups.setdefault(json.dumps([asdict(of.model), of.seed, of.evaluation.batch_size]), []).append(directory)

    for directory in map(RunDirectory, map(Path, runs)):
        if failed := _attempt(partial(to_its_group, directory)):
            directory.forgetting_failure.write_text(failed)
    for group in groups.values():
        _measure_beside_one_base(group, found[0], settings)
    return 0


def _measure_beside_one_base(runs: list[RunDirectory], head: Path | None, settings: dict[str, Any]) -> None:
    from jaxpeft.comparison import forgetting

    bases: list[forgetting.Reference] = []

    def measure_base() -> None:
        data, of = DataConfig(**settings["data"]), runs[0].read_config()
        sizes = {"max_rows": settings["max_rows"], "batch_size": of.evaluation.batch_size}
        bases.append(forgetting.reference(of.model, data, head, seed=of.seed, **sizes))

    def measure(run: RunDirectory) -> None:
        values = forgetting.measure(run.path, bases[0])
        run.forgetting.write_text(json.dumps({**values, "settings": settings}, indent=2) + "\n")

    failed = _attempt(measure_base)
    for run in runs:
        if why := failed or _attempt(partial(measure, run)):
            run.forgetting_failure.write_text(why)


def _attempt(action: Callable[[], None]) -> str | None:
    """Run `action`. Returns None, or in one line why it failed."""
    try:
        action()
    except InputError as error:
        return str(error)
    except Exception as error:  # a bug of ours: the next run may succeed, but the traceback must be seen
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return None


if __name__ == "__main__":
    main()
