"""The rows of the report: the measurements of a method on a task, over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from jaxpeft.comparison.grid import Cell, CompareConfig, run_of, search_cells
from jaxpeft.comparison.records import Record, Search, read_cost, read_record, searches
from jaxpeft.comparison.statistics import Difference, paired_difference
from jaxpeft.report.methods import method_name
from jaxpeft.report.results import Results
from jaxpeft.tasks import task_for
from jaxpeft.tasks.base import Task
from jaxpeft.tasks.metrics import get_metric


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `values`, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation (n − 1 in the denominator); None for a single value."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        task: the task's name.
        method: the method's name in the file.
        title: the method's name in the report.
        search: the search for its learning rate.
        runs: its finished runs at the best learning rate, by seed.
        cost: its short run for speed and memory.
        difference: of the deciding metric to the baseline, on the seeds that both finished; None for the baseline itself.
    """

    task: str
    method: str
    title: str
    search: Search | None
    runs: Mapping[int, Record]
    cost: Results | None
    difference: Difference | None = None

    @property
    def kind(self) -> Task:
        """The task, for the labels of the data: a classification whose labels are numbers is a regression."""
        return task_for(self.any.task, self.any.num_labels, self.any.label_names)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the task's report that the data has, the deciding one first."""
        return tuple(name for name in self.kind.reported_metrics if name in self.any.test)

    @property
    def any(self) -> Results:
        """The results of any one run, to read values that are the same in all of them."""
        results = next(iter(self.runs.values())).results
        assert results
        return results

    def quality(self, metric: str) -> Spread:
        """A metric of the test split over the seeds."""
        return Spread(tuple(record.results.test[metric] for record in self.runs.values() if record.results))

    @property
    def kept_parameters(self) -> float:
        """Trained parameters less those that pruning set to zero, the mean over the seeds."""
        found = [record.results for record in self.runs.values() if record.results]
        pruned = [r.adapter_entries - r.adapter_entries_kept if r.sparsity else 0 for r in found]
        return found[0].parameters_trainable - fmean(pruned)

    @property
    def forgetting(self) -> tuple[float, Spread] | None:
        """Perplexity of general text: before, and after over the seeds. None if it was not measured."""
        found = [record.forgetting for record in self.runs.values() if record.forgetting]
        return (found[0]["before"], Spread(tuple(each["after"] for each in found))) if found else None

    @property
    def wall_seconds(self) -> float:
        """Mean seconds of a run in the grid, over the seeds. Runs that trained in one program share its time equally."""
        return fmean(r.seconds / r.trained_together for record in self.runs.values() if (r := record.results))

    @property
    def training_seconds(self) -> float | None:
        """Seconds to train one run by itself, without compiling and evaluation: its steps at the speed of `cost`."""
        return self.cost.seconds_per_step * self.any.steps if self.cost else None


@dataclass(frozen=True)
class Summary:
    """A whole comparison so far: rows by task, in the file's order. A method without a finished run has no row.

    `failures` are pairs (run, reason).
    """

    config: CompareConfig
    rows: Mapping[str, Sequence[Row]]
    searches: Sequence[Search]
    failures: Sequence[tuple[str, str]]
    records: Sequence[Record]


def summarise(config: CompareConfig) -> Summary:
    """Read all runs of a comparison from disk, finished or not."""
    searched = [read_record(config, cell) for cell in search_cells(config)]
    chosen = searches(searched)
    best = {(each.task, each.method): each for each in chosen}
    records = {record.cell: record for record in searched}
    rows: dict[str, list[Row]] = {}
    failures = []
    for task in config.tasks:
        found = []
        for method in config.methods_of(task):
            cost, why = read_cost(config, task, method)
            failures += [(f"{task}-{method}, the short run to measure costs", why)] if why else []
            search = best.get((task, method))
            if search is None or search.best is None:  # still searching, or every rate failed
                continue
            cells = [Cell(task, method, search.best, seed) for seed in config.seeds]
            for cell in cells:
                records.setdefault(cell, read_record(config, cell))
            runs = {cell.seed: records[cell] for cell in cells if records[cell].results}
            if runs:
                found.append(Row(task, method, _title(config, cells[0]), search, runs, cost))
        rows[task] = [_with_difference(row, found, config.baseline) for row in _with_unique_titles(found)]
    failures += [(record.cell.name, why) for record in records.values() for why in record.failures]
    return Summary(config, rows, chosen, failures, list(records.values()))


def _with_unique_titles(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the file's method name added to titles that occur more than once."""
    titles = [row.title for row in rows]
    return [replace(row, title=f"{row.title} ({row.method})") if titles.count(row.title) > 1 else row for row in rows]


def _title(config: CompareConfig, cell: Cell) -> str:
    run = run_of(config, cell)
    return method_name(run.adapter, run.pruning, run.model, run.contextual)


def _with_difference(row: Row, rows: Sequence[Row], baseline: str) -> Row:
    other = next((each for each in rows if each.method == baseline), None)
    if other is None or row.method == baseline:
        return row
    shared = [seed for seed in row.runs if seed in other.runs]
    metric = row.metrics[0]

    def values(of: Row) -> list[float]:
        return [results.test[metric] for seed in shared if (results := of.runs[seed].results)]

    difference = paired_difference(values(row), values(other)) if shared else None
    return replace(row, difference=difference)


def verdict(row: Row, baseline: str) -> str:
    """The difference to the baseline in words: better, worse, or not distinguishable."""
    d = row.difference
    if d is None:
        return "–"
    if d.low is None:
        return "one seed: no interval"
    if not d.is_distinguishable:
        return f"not distinguishable from {baseline}"
    better = (d.mean > 0) == get_metric(row.metrics[0]).larger_is_better
    return f"{'better' if better else 'worse'} than {baseline}"
