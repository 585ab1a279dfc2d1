"""The report of a comparison: `report.md`, a self-contained `report.html`, `results.csv`, pictures, and tables in the terminal."""

from __future__ import annotations

import base64
import csv
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from jaxpeft.comparison.grid import CompareConfig
from jaxpeft.comparison.pictures import draw
from jaxpeft.comparison.records import Record, Search
from jaxpeft.comparison.statistics import CONFIDENCE
from jaxpeft.comparison.summary import Row, Spread, Summary, summarise, verdict
from jaxpeft.report.console import log, show_table
from jaxpeft.tasks.metrics import METRICS, get_metric


@dataclass(frozen=True)
class Column:
    """One cell of the report with its column: the column's head, the cell's text, and the value to sort by."""

    head: str
    text: str
    value: float | str | None


def write_report(config: CompareConfig) -> Path:
    """Write the report of all runs so far, print its tables, and return the path of the HTML file."""
    summary = summarise(config)
    directory = config.directory
    pictures = {task: draw(rows, directory / "pictures", task) for task, rows in summary.rows.items() if rows}
    tables = {task: [cells(row, config.baseline) for row in rows] for task, rows in summary.rows.items() if rows}
    context: dict[str, Any] = {
        "config": config,
        "tables": tables,
        "pictures": pictures,
        "searches": [search_row(each) for each in summary.searches],
        "failures": summary.failures,
        "cards": [(r.cell.name, _card(r, directory)) for r in summary.records if r.results],
        "notes": notes(summary),
        "machine": _machine(summary),
    }
    (directory / "report.md").write_text(_render("report.md.j2", directory=directory, **context))
    (directory / "report.html").write_text(_render("report.html.j2", autoescape=True, **context))
    _write_csv(summary.records, directory / "results.csv")
    for task, rows in tables.items():
        shown = [[column for column in row if column.head in _IN_THE_TERMINAL] for row in rows]
        show_table(task, [column.head for column in shown[0]], [[column.text for column in row] for row in shown])
    for what, why in summary.failures:
        log(f"failed: {what}: {why}")
    path = directory / "report.html"
    log(f"report: {path}")
    return path


_METRICS = {metric.title for metric in METRICS.values()}
_IN_THE_TERMINAL = {"method", "trained", "tokens/s", "against the baseline", *_METRICS}


def cells(row: Row, baseline: str) -> list[Column]:
    """A row of the report's table."""
    results, cost, forgetting = row.any, row.cost, row.forgetting
    of = f" of the {cost.peak_memory_of}" if cost else ""
    memory = f"{cost.peak_memory_bytes / 1e9:.2f}" if cost else "–"
    seconds = row.training_seconds
    return [
        Column("method", row.title, row.title),
        Column("learning rate", f"{row.search.best:g}" if row.search else "–", row.search.best if row.search else None),
        *(Column(get_metric(m).title, spread(m, s := row.quality(m)), s.mean) for m in row.metrics),
        Column("seeds", str(len(row.runs)), len(row.runs)),
        Column("against the baseline", _difference(row, baseline), row.difference.mean if row.difference else None),
        Column("trained", f"{results.parameters_trainable:,}", results.parameters_trainable),
        Column("kept", f"{row.kept_parameters:,.0f}", row.kept_parameters),
        Column("of parameters", f"{results.parameters_total:,}", results.parameters_total),
        Column("file (MB)", f"{results.export_bytes / 1e6:.2f}", results.export_bytes),
        Column(f"peak memory{of} (GB)", memory, cost.peak_memory_bytes if cost else None),
        Column("tokens/s", f"{cost.tokens_per_second:,.0f}" if cost else "–", cost.tokens_per_second if cost else None),
        Column("compile (s)", f"{cost.compile_seconds:.1f}" if cost else "–", cost.compile_seconds if cost else None),
        Column("training (s)", f"{seconds:,.0f}" if seconds else "–", seconds),
        Column("wall time (s)", f"{row.wall_seconds:,.0f}", row.wall_seconds),
        Column("forgetting", _forgetting(forgetting), forgetting[1].mean - forgetting[0] if forgetting else None),
    ]


def spread(metric: str, of: Spread) -> str:
    """Mean ± standard deviation, with the metric's digits."""
    digits = get_metric(metric).digits
    deviation = "" if of.deviation is None else f" ± {of.deviation:,.{digits}f}"
    return f"{of.mean:,.{digits}f}{deviation}"


def _difference(row: Row, baseline: str) -> str:
    d = row.difference
    if d is None:
        return "the baseline" if row.method == baseline else "–"
    digits = get_metric(row.metrics[0]).digits
    interval = "" if d.low is None else f" [{d.low:+,.{digits}f}, {d.high:+,.{digits}f}]"
    return f"{d.mean:+,.{digits}f}{interval}: {verdict(row, baseline)}"


def _forgetting(found: tuple[float, Spread] | None) -> str:
    return "–" if found is None else f"{found[0]:,.1f} → {spread('perplexity', found[1])}"


_NOTES = """
Every method is trained at its own best learning rate: the rate with the best mean on validation over the search's seeds
({search_seeds}), each with the adapter that validation chose.

Quality is the mean over the seeds ± the sample standard deviation. Differences are to {baseline} on the same seeds, with a
{confidence:.0%} percentile bootstrap interval over the pairs. A method is called better or worse if the interval excludes 0 and a
paired t-test has p < 0.05. The interval alone is not enough: with three seeds it excludes 0 by chance one time in four. There is no
correction for the number of comparisons.

Tokens/s, peak memory and compile time are measured in a separate run of {cost_steps} steps, in a process of its own and without
cached programs. Tokens/s count real tokens, over log intervals after the first in which nothing was compiled. Peak memory includes
evaluation at evaluation.batch_size. Compile time is the total for all programs of the process.

Trained parameters less those that pruning set to zero are kept. In classification both include the new head.

Training time is only a run's steps, at that speed. Wall time is the time a run took in the grid from its first step to its last,
including compiling and validations. Runs that trained in one program share its time equally. Programs came from a cache if
possible.
"""

_FORGETTING = """
Forgetting is masked-LM perplexity on {text}, of the base → of the fine-tuned encoder, both with the same masked-LM head. An
encoder that was trained with a new head of its own, as in masked-LM, fits its own head better than this common head.
"""


def notes(summary: Summary) -> list[str]:
    """Notes for the reader on how the numbers were measured, one paragraph each."""
    config = summary.config
    seeds = ", ".join(map(str, config.seeds[: config.search_seeds]))
    text = _NOTES.format(
        search_seeds=seeds, baseline=config.baseline, confidence=CONFIDENCE, cost_steps=config.cost_steps
    )
    if config.forgetting:
        text += _FORGETTING.format(text=config.forgetting.data.name or config.forgetting.data.train_file)
    lines = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    lines += [
        f"{task} has no test rows. Its figures are on the validation rows that chose learning rate and adapter, so all are too good."
        for task, rows in summary.rows.items()
        if rows and rows[0].any.test_split == "validation"
    ]
    chosen_by = {search.task: get_metric(search.metric).title for search in summary.searches if search.metric}
    if chosen_by:
        said = ", ".join(f"{metric} ({task})" for task, metric in chosen_by.items())
        lines.insert(1, f"Validation chose learning rates and adapters by one metric: {said}.")
    edges = [f"{search.method} on {search.task} ({search.best:g})" for search in summary.searches if search.at_the_edge]
    if edges:
        lines.append(
            f"The best learning rate is at the edge of those tried, so a better one may lie beyond: {', '.join(edges)}."
        )
    together = sum(1 for record in summary.records if record.results and record.results.trained_together > 1)
    if together:
        lines.append(
            f"{together} runs trained in one program with other runs of the grid, each with its own data order, dropout and optimizer."
        )
    return lines


def search_row(search: Search) -> dict[str, Any]:
    """A search in the words of the report: the rates that were tried, each with its score, and whether it is the best."""
    metric = get_metric(search.metric) if search.metric else None  # None: every run failed
    sign = 1 if metric is None or metric.larger_is_better else -1
    tried = [
        (f"{rate:g}", "failed" if value is None else f"{sign * value:.4g}", rate == search.best)
        for rate, value in search.scores.items()
    ]
    title = metric.title if metric else ""
    return {"task": search.task, "method": search.method, "metric": title, "tried": tried, "edge": search.at_the_edge}


def _card(record: Record, directory: Path) -> str:
    assert record.results
    return (Path(record.results.export) / "README.md").relative_to(directory).as_posix()


def _machine(summary: Summary) -> str:
    results = next((r.results for r in summary.records if r.results), None)
    if results is None:
        return platform.machine()
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    return f"{results.device}; {versions}"


def _write_csv(records: Iterable[Record], path: Path) -> None:
    """Write one line for every run of the grid, finished or failed."""
    lines = []
    for record in sorted(records, key=lambda each: each.cell):
        cell, results = record.cell, record.results
        line: dict[str, Any] = {
            "task": cell.task,
            "method": cell.method,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "status": "finished" if results else "failed" if record.failure else "not run",
        }
        if results:
            forgetting = record.forgetting or {}
            line |= {f"{results.test_split}_{name}": value for name, value in results.test.items()}
            line |= {f"before_{name}": value for name, value in results.before.items()}
            line |= {
                f"general_perplexity_{name}": forgetting[name] for name in ("before", "after") if name in forgetting
            }
            for name in ("parameters_total", "parameters_trainable", "export_bytes", "best_step", "steps", "seconds",
                         "seconds_per_step", "tokens_per_second", "peak_memory_bytes", "compile_seconds", "trained_together"):  # fmt: skip
                line[name] = getattr(results, name)
            line["validation_score"] = record.validation()
        lines.append(line | ({"failure": "; ".join(record.failures)} if record.failures else {}))
    # Lines differ in their metrics, so the header is the union of their keys.
    names = list(dict.fromkeys(name for line in lines for name in line))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(lines)


def _render(template: str, *, autoescape: bool = False, **context: Any) -> str:
    environment = Environment(autoescape=autoescape, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["data_uri"] = _data_uri  # pictures inside the HTML, so that it is a single file
    environment.filters["relative"] = lambda path, directory: Path(path).relative_to(directory).as_posix()
    source = (files("jaxpeft.comparison") / "templates" / template).read_text()
    return environment.from_string(source).render(**context)


def _data_uri(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
