"""Console output of a run: lines, a progress bar and tables. Without a terminal all of it is plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def log(text: str) -> None:
    """Print one line to the console, without markup."""
    console.print(text, markup=False)


def set_quiet() -> None:
    """Print nothing from now on. For all but one of several processes."""
    console.quiet = True


class _Bar:
    """A progress bar, shown while its block runs."""

    _progress: Progress

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._progress.disable:  # before 14.3, rich prints an empty line for a bar that it never showed
            self._progress.stop()


class TrainingBar(_Bar):
    """A progress bar with loss, tokens/s and time left. Without a terminal it prints one line per log interval instead."""

    def __init__(self, done: int, total: int) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self._progress = Progress(TextColumn("training"), *columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=total, completed=done, figures="")
        self._total = total

    def advance(self, step: int) -> None:
        """Move the bar to `step` completed steps."""
        self._progress.update(self._task, completed=step)

    def show(self, step: int, *, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show the figures of a log interval that ended after `step` steps."""
        figures = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, figures=figures)
        if not console.is_terminal:  # the bar is disabled then
            log(f"step {step:>5}/{self._total}  {figures}  {_duration(seconds_left)} left")


class RowsBar(_Bar):
    """A progress bar over rows, on the error stream. Without a terminal there is none."""

    def __init__(self, what: str, total: int) -> None:
        errors = Console(stderr=True)
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=errors, disable=not errors.is_terminal)
        self._task = self._progress.add_task(what, total=total)

    def advance(self, rows: int) -> None:
        """Move the bar by `rows`."""
        self._progress.update(self._task, advance=rows)


def before_after_table(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print a table of rows (name, before, after)."""
    table = Table("", "before", "after", title=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def show_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. The first column is left-aligned for text, the others are right-aligned for numbers."""
    table = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
