"""`python -m jaxpeft compare`: train the runs of a grid, skip those that are done, note failures, and write one report.

This module uses no device. Every job is a process of its own (`jobs.py`), one after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from jaxpeft.comparison import jobs
from jaxpeft.comparison.grid import Cell, CompareConfig, cells_at, cost_run, head_run, run_of, search_cells
from jaxpeft.comparison.records import Record, read_record, searches
from jaxpeft.comparison.report import write_report
from jaxpeft.config import RunConfig
from jaxpeft.errors import InputError
from jaxpeft.report.console import log
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.sweep_key import chunked, sweep_key


@dataclass(frozen=True)
class Planned:
    """A run to be trained by a worker.

    Attributes:
        name: the run's name.
        directory: the run's directory.
        values: its resolved configuration.
        compilation_cache: the directory of compiled programs, as in the configuration.
        key: equal for runs that can train together; None: the run trains by itself.
    """

    name: str
    directory: RunDirectory
    values: Mapping[str, Any]
    compilation_cache: str | None
    key: str | None

    @classmethod
    def of(cls, config: RunConfig) -> Planned:
        """The run that `config` describes."""
        directory = RunDirectory.of(config)
        return cls(config.run_name, directory, config.resolved(), config.compilation_cache, sweep_key(config))

    @property
    def base(self) -> tuple[str, str]:
        """The name and the weights (pretrained or random) of the run's base."""
        return self.values["model"]["name"], self.values["model"]["weights"]

    @property
    def for_worker(self) -> dict[str, Any]:
        """The run's configuration as part of a worker's job."""
        return {**self.values, "compilation_cache": self.compilation_cache}


def run(config: CompareConfig) -> None:
    """Train the remaining runs of the comparison and write its report.

    Raises:
        InputError: the grid cannot be run (checked before the first run), or another process is working on it.
        SystemExit: 128 + signal, after SIGTERM, SIGHUP or Ctrl-C. The same command then continues the comparison.
    """
    search = search_cells(config)
    for cell in search:  # check all runs before the first one starts
        for seed in config.seeds:
            _check_unchanged(Planned.of(run_of(config, Cell(cell.task, cell.method, cell.learning_rate, seed))))
    for task, method in dict.fromkeys((cell.task, cell.method) for cell in search):
        cost_run(config, task, method)
    _check_forgetting(config, {Planned.of(run_of(config, cell)).base for cell in search})
    config.directory.mkdir(parents=True, exist_ok=True)
    with jobs.alone_in(config.directory):
        values = {key: value for key, value in asdict(config).items() if key != "cost_updates"}  # an old name
        (config.directory / "compare.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        log(f"searching learning rates: {len(search)} runs")
        _train(config, search)
        best = {(s.task, s.method): s.best for s in searches(read_record(config, cell) for cell in search) if s.best}
        cells = cells_at(config, best)
        log(f"all seeds at the best learning rates: {len(cells)} runs")
        _train(config, cells)
        _measure_costs(config, cells)
        if config.forgetting:
            _measure_forgetting(config, cells)
        write_report(config)


def _check_unchanged(run: Planned) -> None:
    if not run.directory.is_started:
        return
    changed = run.directory.differences(run.values)
    if changed:
        raise InputError(
            f"'{run.directory}' was run with another configuration ({'; '.join(changed)}); give the comparison another --name"
        )


def _check_forgetting(config: CompareConfig, bases: Collection[tuple[str, str]]) -> None:
    """Raise InputError if the runs have several bases, since forgetting is measured with one head on one base."""
    if config.forgetting is None:
        return
    if len(bases) > 1:
        names = ", ".join(name for name, _ in sorted(bases))
        raise InputError(
            f"forgetting is measured with one masked-LM head, but the runs have several bases ({names}); "
            "set forgetting to null"
        )
    _check_unchanged(Planned.of(head_run(config)))


def _train(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """Train the runs of `cells` that are not done. Runs that may share a program train together."""
    left = [
        record for cell in cells if not (record := read_record(config, cell)).is_done or _should_retry(config, record)
    ]
    done = len(cells) - len(left)
    if done:
        log(f"{done} of {len(cells)} runs are already done")
    for group in _groups(config, [Planned.of(run_of(config, record.cell)) for record in left]):
        _do_training(group)


def _should_retry(config: CompareConfig, record: Record) -> bool:
    return record.failure is not None and config.retry_failed


def _groups(config: CompareConfig, runs: Sequence[Planned]) -> list[list[Planned]]:
    """Groups of at most `config.together` runs that may share a program. Interrupted runs resume with those at the same step."""
    groups: dict[Any, list[Planned]] = {}
    for number, run in enumerate(runs):
        # A run without a key shares no program: its number makes a group of its own.
        groups.setdefault((run.key, run.directory.newest_step) if run.key else number, []).append(run)
    return [piece for group in groups.values() for piece in chunked(group, config.together)]


def _do_training(runs: Sequence[Planned], *, by_itself: bool = False, **environment: str) -> None:
    """Train `runs` in one process or, if that fails as a whole, one by one. Writes failures to the runs' directories."""
    log(f"── {', '.join(run.name for run in runs)}")
    for run in runs:  # the failure of an earlier attempt must not be read as this one's
        run.directory.failure.unlink(missing_ok=True)
    job = {
        "do": "train",
        "runs": [run.for_worker for run in runs],
        "resume": [run.directory.is_started for run in runs],
        "by_itself": by_itself,
    }
    why = jobs.do(job, **environment)
    left = [run for run in runs if not _has_ended(run.directory)]
    if left and len(runs) > 1:
        log(f"these runs did not train together ({why}); training them one by one:")
        for run in left:
            _do_training([run], by_itself=by_itself, **environment)
        return
    for run in left:
        run.directory.path.mkdir(parents=True, exist_ok=True)
        run.directory.failure.write_text(why or "it ended without results")
    for run in runs:
        if run.directory.failure.is_file():
            log(f"failed: {run.name}: {run.directory.failure.read_text()}")


def _has_ended(directory: RunDirectory) -> bool:
    return directory.is_finished or directory.failure.is_file()


def _measure_costs(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """Train a short run of each (task, method), without company and without cached programs. A run that was cut short restarts."""
    for task, method in dict.fromkeys((cell.task, cell.method) for cell in cells):
        run = Planned.of(cost_run(config, task, method))
        directory = run.directory
        if directory.failure.is_file() and not config.retry_failed:
            continue
        if not directory.is_finished or directory.differences(run.values):
            shutil.rmtree(directory.path, ignore_errors=True)
            # Without the cache, because compile time is one of the costs.
            _do_training([run], by_itself=True, JAX_ENABLE_COMPILATION_CACHE="false")


def _measure_forgetting(config: CompareConfig, cells: Sequence[Cell]) -> None:
    assert config.forgetting
    head = Planned.of(head_run(config))
    wanted = asdict(config.forgetting)
    records = [read_record(config, cell) for cell in cells]
    left = [record for record in records if record.results and not _is_measured(config, record, wanted)]
    if not left:
        return
    log(f"measuring forgetting (perplexity of general text) of {len(left)} runs")
    for record in left:
        record.directory.forgetting_failure.unlink(missing_ok=True)
    job = {
        "do": "forgetting",
        "runs": [str(record.directory) for record in left],
        "head": head.for_worker,
        "resume": head.directory.is_started,
        "settings": wanted,
    }
    why = jobs.do(job)
    for record in left:
        again = read_record(config, record.cell)
        if again.forgetting is None:
            file = record.directory.forgetting_failure
            if not file.is_file():
                file.write_text(why or "it ended without results")
            log(f"forgetting of {record.cell.name} was not measured: {file.read_text()}")


def _is_measured(config: CompareConfig, record: Record, wanted: dict[str, Any]) -> bool:
    if record.directory.forgetting_failure.is_file() and not config.retry_failed:
        return True
    # Settings may have changed since the measurement.
    return record.forgetting is not None and record.forgetting.get("settings") == wanted
