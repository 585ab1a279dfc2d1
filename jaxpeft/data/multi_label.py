"""Labels of rows that have several classes, or none: lists, texts with a delimiter, or a column of 0 and 1 for each class."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft.data.columns import column_values
from jaxpeft.data.label_values import WITHHELD, Label, read_labels, rows_with_label
from jaxpeft.data.labels import Labels, check_two_classes, encode_classes
from jaxpeft.data.sources import ReadOptions
from jaxpeft.data.tables import Tables
from jaxpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_DELIMITERS = (",", ";", "|")
_TRUTH = {"1": True, "0": False, "1.0": True, "0.0": False, "true": True, "false": False}
_HAS_LABEL = Label("name", "a list")


@dataclass(frozen=True)
class _Lists:
    """The classes of each row as they are in the data, by split. None: the row has no label. `notes` say how they were read."""

    rows: Mapping[str, Sequence[list[Any] | None]]
    notes: tuple[str, ...] = ()


def with_label_lists(read: Tables, options: ReadOptions) -> tuple[Tables, ReadOptions]:
    """The tables with one column of labels, and the options that name it.

    The columns `options.label_columns`, of 0 and 1 or of true and false, become one column with a list of classes in each row. If
    a row lacks one of them, it has no label. If no column is named, it is `label` or `labels`.

    Raises:
      InputError: a column does not exist or has another value.
    """
    names = options.label_columns
    if names is None:
        columns = read.tables["train"].column_names
        guess = "labels" if "label" not in columns and "labels" in columns else None
        return read, replace(options, label_column=options.label_column or guess)
    tables = {split: _with_list(table, names, read.where[split]) for split, table in read.tables.items()}
    return replace(read, tables=tables), replace(options, label_column=", ".join(names), label_names=tuple(names))


def _with_list(table: Dataset, names: Sequence[str], where: str) -> Dataset:
    for name in names:
        if name not in table.column_names:
            hint = f"{did_you_mean(name, table.column_names)}; columns: {', '.join(table.column_names)}"
            raise InputError(f"data.label_columns: {where} has no column '{name}'{hint}")
    columns = [_zeros_and_ones(column_values(table, name), name, where) for name in names]
    lists = [
        None if None in row else [name for name, has in zip(names, row, strict=True) if has]
        for row in zip(*columns, strict=True)
    ]
    return table.remove_columns(list(names)).add_column(", ".join(names), lists)


def _zeros_and_ones(values: Sequence[Any], column: str, where: str) -> list[bool | None]:
    """The values of a class's column; None for those that are missing (null, empty, or -1)."""
    found: list[bool | None] = []
    for row, value in enumerate(values):
        text = str(value).strip().casefold()
        if _is_missing(value):
            found.append(None)
        elif text in _TRUTH:
            found.append(_TRUTH[text])
        else:
            raise InputError(
                f"{where}, row {row + 1}: column '{column}' has {value!r}, which is not 0, 1, true or false; correct it, or leave "
                "the column out of data.label_columns"
            )
    return found


def _is_missing(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or str(value).strip() in ("", str(WITHHELD))


def encode_label_lists(raw: Mapping[str, Sequence[Any]], options: ReadOptions) -> Labels:
    """Convert the labels of rows with several classes to 0 and 1 for each class, by one rule for all splits.

    A label is a list of classes, a text with classes between delimiters (an empty one: no class), or a list with a 0 or 1 for each
    class. The classes get their ids as in `encode_labels`.

    Args:
      raw: the labels of each split as they are in its column, train first. The keys name the splits in errors.
      options: the flags; its `label_delimiter` separates the classes in a text, and None finds it among `,`, `;` and `|`.

    Returns:
      labels with columns `[rows, classes]` float32.

    Raises:
      InputError: a label is missing, unknown, or no list of classes. The message names the split, the row (from 1) and the value.
    """
    if options.num_labels == 1:
        raise InputError("these labels are numbers, and multi-label needs classes: give task classification")
    read = _read_lists(raw, options)
    names = options.label_names
    kept = rows_with_label(
        raw,
        {
            where: [_HAS_LABEL if row is not None else Label("missing", "") for row in rows]
            for where, rows in read.rows.items()
        },
        numbers=False,
        names=(),
        drop=options.drop_unlabelled,
    )
    lists = {where: [(row, read.rows[where][row] or []) for row in rows] for where, rows in kept.items()}
    notes = [
        f"{len(raw[where]) - len(rows)} of {len(raw[where])} rows of {where} have no label and are left out"
        for where, rows in kept.items()
        if len(rows) < len(raw[where])
    ]
    notes += read.notes
    if size := _length_of_vectors(lists):
        lists = {
            where: [(row, [i for i, has in enumerate(each) if has]) for row, each in rows]
            for where, rows in lists.items()
        }
        notes.append(f"every label is a list of {size} numbers 0 or 1, one for each class")
        options = replace(options, num_labels=_size_of(size, options))
    found = {
        where: [(row, label) for row, each in rows for label in _labels_of(where, row, each)]
        for where, rows in lists.items()
    }
    first, first_rows = next(iter(lists.items()))
    if not found[first] and names is None:
        raise InputError(f"no row of {first} has a class; give another data.label_column")
    encoded = encode_classes(found, options.num_labels, names, options.base_names or ())
    check_two_classes(encoded, first)
    if not any(len(each) > 1 for _, each in first_rows):
        notes.append(f"no row of {first} has more than one class")
    columns = {where: _table(lists[where], encoded.columns[where], encoded.num_labels) for where in lists}
    rows = {where: np.asarray(each, np.int64) for where, each in kept.items()}
    return replace(encoded, columns=columns, rows=rows, notes=(*notes, *encoded.notes))


def _table(lists: Sequence[tuple[int, list[Any]]], ids: np.ndarray, num_labels: int) -> np.ndarray:
    """`[rows, classes]` with 1 at the classes of each row. `ids` are those of all rows, one row after the other."""
    table = np.zeros((len(lists), num_labels), np.float32)
    table[np.repeat(np.arange(len(lists)), [len(each) for _, each in lists]), ids] = 1
    return table


def _read_lists(raw: Mapping[str, Sequence[Any]], options: ReadOptions) -> _Lists:
    """The labels as lists. Texts are divided, all by the same rule."""
    texts = [value for column in raw.values() for value in column if isinstance(value, str) and value.strip()]
    delimiter, notes, written = options.label_delimiter, [], False
    if delimiter is not None and not texts:
        raise InputError(
            f"data.label_delimiter '{delimiter}' is for labels in a text, and these are lists; leave it out"
        )
    if texts and delimiter is None:
        written = all(text.strip().startswith("[") and text.strip().endswith("]") for text in texts)
        delimiter = None if written else _delimiter(texts, next(iter(raw)))
        how = "lists that are written as text" if written else f"separated by '{delimiter}'" if delimiter else None
        notes = [f"the labels are {how}"] if how else []

    def classes(where: str, row: int, value: Any) -> list[Any] | None:
        if isinstance(value, str):
            return _of_text(where, row, value.strip(), delimiter, written, options.label_names or ())
        if isinstance(value, list | tuple):
            return list(value)
        return None if _is_missing(value) else [value]

    rows = {where: [classes(where, row, value) for row, value in enumerate(column)] for where, column in raw.items()}
    return _Lists(rows, tuple(notes))


def _of_text(
    where: str, row: int, text: str, delimiter: str | None, written: bool, names: Sequence[str]
) -> list[Any] | None:
    if text.casefold() in ("-", "null", "nan", str(WITHHELD)) and text not in names:
        return None
    if written and text:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise InputError(f"{where}, row {row + 1}: the label {text!r} is not a list; correct it") from error
        return list(found)
    return [part.strip() for part in text.split(delimiter) if part.strip()] if delimiter else [text] * bool(text)


def _delimiter(texts: Sequence[str], where: str) -> str | None:
    """The delimiter in `texts`; None if they have none.

    Raises:
      InputError: they have several.
    """
    found = [delimiter for delimiter in _DELIMITERS if any(delimiter in text for text in texts)]
    if len(found) > 1:
        raise InputError(
            f"{where}: the labels contain {' and '.join(repr(each) for each in found)}; give data.label_delimiter, the one that separates "
            "classes"
        )
    return found[0] if found else None


def _length_of_vectors(lists: Mapping[str, Sequence[tuple[int, list[Any]]]]) -> int | None:
    """The length of the lists if each has a 0 or 1 for every class; None if they name classes.

    Lists of names have no number twice and different lengths; these have one length, and in one of them a number stands twice.
    """
    every = [each for rows in lists.values() for _, each in rows]
    size = len(every[0])
    alike = size > 1 and all(len(each) == size for each in every)
    if not alike or not all(not isinstance(value, str) and value in (0, 1) for each in every for value in each):
        return None
    return size if any(len(set(each)) < size for each in every) else None


def _size_of(size: int, options: ReadOptions) -> int | None:
    """The number of classes for `encode_classes`, whose `label_names` say it already if they are given."""
    given = options.num_labels or (len(options.label_names) if options.label_names else size)
    if given != size:
        flag = "data.num_labels" if options.num_labels else "data.label_names"
        raise InputError(
            f"every label is a list of {size} numbers 0 or 1, but {flag} says {given} classes; make the two agree"
        )
    return size


def _labels_of(where: str, row: int, classes: Sequence[Any]) -> list[Label]:
    for value in classes:
        if not isinstance(value, str | int | float) or (not isinstance(value, bool) and _is_missing(value)):
            raise InputError(
                f"{where}, row {row + 1}: {value!r} in the labels {list(classes)} is not a class; correct the list, or leave the entry out"
            )
    return read_labels({where: classes})[where]
