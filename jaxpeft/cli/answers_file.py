"""The answers to the texts of a file, as lines of JSON or as a CSV file."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

from jaxpeft.data import Split
from jaxpeft.errors import InputError
from jaxpeft.report.console import RowsBar
from jaxpeft.runs.load import TrainedRun
from jaxpeft.tasks.base import RowError

Write = Callable[[Mapping[str, Any]], None]

_FORMATS = (".jsonl", ".csv")


def check_output(path: Path) -> None:
    """Raise InputError if `path` is of no known format, exists, or has no directory."""
    if path.suffix not in _FORMATS:
        raise InputError(
            f"--output {path}: the format '{path.suffix}' is unknown; give a name that ends in .jsonl or .csv"
        )
    if path.exists():
        raise InputError(f"--output {path} exists; remove it, or give another name")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--output {path}: there is no directory {path.absolute().parent}")


def write_answers(trained: TrainedRun, split: Split, output: Path | None, *, where: str, top: int | None) -> None:
    """Write a record for each text: its row (from 1), the text or texts, and the answer (`Task.as_record`).

    The memory does not depend on the number of texts. `output` appears when it is whole; None writes JSON lines to the terminal.

    Args:
        trained: the run.
        split: the texts.
        output: a .jsonl or .csv file.
        where: the file of the texts, for messages.
        top: the number of answers per text or mask. None: 5 per mask, and every label.

    Raises:
        InputError: a text cannot be answered. The message has its row.
    """
    task, rows, num_truncated = trained.objective.task, count(), 0
    top = 5 if top is None and task.fills_masks else top
    pairs = split.pairs
    with _writer(output, whole=top is None) as write, RowsBar("answering", len(split)) as bar:
        try:
            for reply in trained.replies(split, top=top):
                for answer, i in zip(reply.answers, rows, strict=False):
                    texts = {"text": split.texts[i]} | ({} if pairs is None else {"text_pair": pairs[i]})
                    write({"row": i + 1, **texts, **task.as_record(answer)})
                num_truncated += reply.num_truncated
                bar.advance(len(reply.answers))
        except RowError as error:
            raise InputError(f"{where}, row {error.row + 1}: {error}") from None
    told = f"{len(split):,} texts" + (f" → {output}" if output else "")
    if num_truncated:
        told += f"; {num_truncated:,} were longer than {trained.config.data.max_length} tokens and were cut"
    print(told, file=sys.stderr)


@contextmanager
def _writer(output: Path | None, *, whole: bool) -> Iterator[Write]:
    """A function that writes a record. `whole` says that the mappings in all records have the same names."""
    if output is None:
        yield lambda record: print(json.dumps(record, ensure_ascii=False))
        return
    unfinished = output.with_name(output.name + ".unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            yield _csv(file, whole=whole) if output.suffix == ".csv" else lambda record: _json_line(file, record)
        unfinished.replace(output)
    finally:
        unfinished.unlink(missing_ok=True)


def _json_line(file: IO[str], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _csv(file: IO[str], *, whole: bool) -> Write:
    columns: list[str] = []
    writer = csv.writer(file)

    def write(record: Mapping[str, Any]) -> None:
        flat = dict(_columns(record, whole=whole))
        if not columns:
            columns.extend(sorted(flat, key=lambda name: "." in name))  # of every record the same names
            writer.writerow(columns)
        writer.writerow([flat[name] for name in columns])

    return write


def _columns(record: Mapping[str, Any], *, whole: bool) -> Iterator[tuple[str, Any]]:
    """The cells of a record. A mapping has a column for each of its names, if it is `whole`; other values inside are JSON."""
    for name, value in record.items():
        if isinstance(value, Mapping) and whole:
            yield from ((f"{name}.{inner}", cell) for inner, cell in value.items())
        else:
            yield name, json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else value
