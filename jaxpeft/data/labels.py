"""Convert the labels of a file (ids, names, numbers as text) to class ids or regression targets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.errors import InputError, did_you_mean

_INTEGER = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def encode_labels(
    columns: Mapping[str, Sequence[Any]], *, num_labels: int | None, label_names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...] | None]:
    """Convert raw labels to numbers by one rule for all splits.

    Names (text that is not a number) become ids: positions in `label_names` or, if it is None, in the sorted names of
    the first split. Integers are ids. Numbers with a fraction are regression targets, and so is every number if
    `num_labels` is 1.

    Args:
      columns: the labels of each split, train first. The keys name the splits in errors.
      num_labels: the number of classes, 1 for regression; None counts those of the first split.
      label_names: the names of the classes in the order of their ids, or None.

    Returns:
      The labels of each split, `[rows]` int32 or float32 (regression); the number of classes (1 for regression); the
      classes' names or None.

    Raises:
      InputError: a label is missing, unknown or out of range. The message names the split, the row (from 1) and the
        value.
    """
    parsed = {where: [_number(value, where, row) for row, value in enumerate(raw)] for where, raw in columns.items()}
    # Of all splits together: one name in any of them makes the labels of all of them names.
    values = [value for column in parsed.values() for value in column]
    if num_labels == 1:
        return _targets(parsed), 1, None
    if any(isinstance(value, str) for value in values) or _are_names(values, label_names):
        return _encode_names(parsed, num_labels, label_names)
    if num_labels is None and label_names is None and any(value != int(value) for value in values):
        return _targets(parsed), 1, None
    return _encode_ids(parsed, num_labels, label_names)


def _number(value: Any, where: str, row: int) -> int | float | str:
    """The value as a number if it is one or its text reads as one; other text is returned stripped."""
    if isinstance(value, str):  # .csv and .tsv give numbers as text
        text = value.strip()
        if _INTEGER.fullmatch(text):
            return int(text)
        value = float(text) if _NUMBER.fullmatch(text) else text
    if value is None or value == "" or (isinstance(value, float) and not np.isfinite(value)):
        raise InputError(f"{where}, row {row + 1}: the label is missing ({value!r}); fill it in or drop the row")
    if not isinstance(value, int | float | str):
        raise InputError(
            f"{where}, row {row + 1}: the label {value!r} is neither a number nor a name; give another label_column"
        )
    return value


def _are_names(values: Sequence[int | float | str], label_names: Sequence[str] | None) -> bool:
    """Whether numbers are class names, such as "1" to "5": `label_names` must contain every one of them."""
    return label_names is not None and all(str(value) in label_names for value in values)


def _targets(columns: Mapping[str, list[Any]]) -> dict[str, np.ndarray]:
    for where, column in columns.items():
        for row, value in enumerate(column):
            if isinstance(value, str):
                raise InputError(f"{where}, row {row + 1}: the label '{value}' is not a number; set num_labels above 1")
    return {where: np.asarray(column, np.float32) for where, column in columns.items()}


def _encode_names(
    columns: Mapping[str, list[Any]], num_labels: int | None, label_names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...]]:
    first = next(iter(columns.values()))
    names = tuple(label_names) if label_names is not None else tuple(sorted({str(value) for value in first}))
    if num_labels is not None and num_labels != len(names):
        raise InputError(f"num_labels is {num_labels}, but the labels are {', '.join(names)}; make the two agree")
    if len(names) == 1:
        raise InputError(f"all labels are '{names[0]}'; a classification needs at least two classes")
    ids = {name: index for index, name in enumerate(names)}
    encoded = {}
    for where, column in columns.items():
        for row, value in enumerate(column):
            if str(value) not in ids:
                hint = did_you_mean(str(value), names) or f"; known: {', '.join(names)}"
                raise InputError(f"{where}, row {row + 1}: the label '{value}' is unknown{hint}")
        encoded[where] = np.asarray([ids[str(value)] for value in column], np.int32)
    return encoded, len(names), names


def _encode_ids(
    columns: Mapping[str, list[Any]], num_labels: int | None, label_names: Sequence[str] | None
) -> tuple[dict[str, np.ndarray], int, tuple[str, ...] | None]:
    names = None if label_names is None else tuple(label_names)
    if names is not None and num_labels is not None and num_labels != len(names):
        raise InputError(f"num_labels is {num_labels}, but label_names has {len(names)}; make the two agree")
    known = len(names) if names is not None else num_labels
    # At least two: a single class cannot be learned, so a file with only label 0 most likely has another class.
    count = known if known is not None else max(2, 1 + int(max(next(iter(columns.values())))))
    for where, column in columns.items():
        for row, value in enumerate(column):
            if value != int(value) or not 0 <= value < count:
                hint = f"not one of the ids 0 to {count - 1}; correct it or set num_labels (1 = regression)"
                raise InputError(f"{where}, row {row + 1}: the label {value} is {hint}")
    return {where: np.asarray(column, np.int32) for where, column in columns.items()}, count, names
