"""Read the runs of a comparison back from disk: one record per run, whether it finished or failed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jaxpeft.comparison.grid import Cell, CompareConfig
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.report.results import Results, read_results
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.tasks.metrics import score


@dataclass(frozen=True)
class Record:
    """A run of the grid. It has `results` if it finished, `failure` (the reason) if it failed, and neither before it ended."""

    cell: Cell
    directory: RunDirectory
    results: Results | None = None
    failure: str | None = None

    @property
    def is_done(self) -> bool:
        """True if the run has finished or failed."""
        return self.results is not None or self.failure is not None

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The validations in order, each with `step` and metrics."""
        return [row for row in read_metrics(self.directory.metrics) if row["split"] == "validation"]

    def validation(self) -> float:
        """The validation score of the best adapter, larger is better. It decides the learning rate."""
        assert self.results
        (best,) = [row for row in self.curve if row["step"] == self.results.best_step][-1:]
        return score(best, self.results.best_metric)

    @property
    def forgetting(self) -> dict[str, Any] | None:
        """Perplexity of general text, `before` and `after`, with the `settings` of the measurement. None if not measured."""
        file = self.directory.forgetting
        return json.loads(file.read_text()) if file.is_file() else None

    @property
    def failures(self) -> list[str]:
        """The reasons for which the run, or the measurement of its forgetting, failed."""
        file = self.directory.forgetting_failure
        forgetting = [f"forgetting was not measured: {file.read_text()}"] if file.is_file() else []
        return [*([self.failure] if self.failure else []), *forgetting]


def read_record(config: CompareConfig, cell: Cell) -> Record:
    """The record of a cell's run. The run need not have ended, or even started."""
    directory = RunDirectory(config.directory / "runs" / cell.name)
    return Record(cell, directory, *_outcome(directory))


def read_cost(config: CompareConfig, task: str, method: str) -> tuple[Results | None, str | None]:
    """The results of a method's short run for costs, or the reason of its failure. Both are None before it ended."""
    return _outcome(RunDirectory(config.directory / "costs" / f"{task}-{method}"))


def _outcome(directory: RunDirectory) -> tuple[Results | None, str | None]:
    if directory.is_finished:
        return read_results(directory.results), None
    return None, directory.failure.read_text() if directory.failure.is_file() else None


@dataclass(frozen=True)
class Search:
    """The search for a method's learning rate on a task.

    `scores` maps a rate to the mean score of the validation `metric`, or to None if a run failed. A score is the metric
    itself or, for metrics where smaller is better (loss, perplexity), its negative. `metric` is None if every run failed.
    """

    task: str
    method: str
    metric: str | None
    scores: Mapping[float, float | None]

    @property
    def best(self) -> float | None:
        """The rate with the best mean, the smallest of equal ones. None if every rate failed."""
        known = {rate: value for rate, value in self.scores.items() if value is not None}
        # sorted: `max` takes the first of equal ones.
        return max(sorted(known), key=known.__getitem__) if known else None

    @property
    def at_the_edge(self) -> bool:
        """True if the best of several rates is the smallest or the largest, so that a better one may lie beyond."""
        return len(self.scores) > 1 and self.best in (min(self.scores), max(self.scores))


def searches(records: Iterable[Record]) -> list[Search]:
    """One `Search` for every (task, method) in `records` whose runs have all ended."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.cell.task, record.cell.method), []).append(record)
    return [
        Search(
            task,
            method,
            next((record.results.best_metric for record in group if record.results), None),
            {rate: _mean_score(group, rate) for rate in sorted({r.cell.learning_rate for r in group})},
        )
        for (task, method), group in groups.items()
        if all(record.is_done for record in group)
    ]


def _mean_score(records: Sequence[Record], rate: float) -> float | None:
    here = [record for record in records if record.cell.learning_rate == rate]
    return fmean(record.validation() for record in here) if all(record.results for record in here) else None
