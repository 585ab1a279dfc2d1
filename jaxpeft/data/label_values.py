"""Read single labels of a file: whole numbers, fractions, names and codes, and those that are missing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxpeft.errors import InputError

Kind = Literal["missing", "integer", "fraction", "number", "name"]

_WHOLE = re.compile(r"(0|-?[1-9]\d*)(\.0*)?")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_ANY_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MISSING = ("", "-", "null", "nan")
WITHHELD = -1
"""The id of a label that is withheld, as in GLUE's test splits and SNLI."""


@dataclass(frozen=True)
class Label:
    """A label as it was read.

    Attributes:
      kind: "integer": a whole number in its usual form; "fraction": a number with decimals; "number": another form of a
        number (`+1`, `1e5`), which is a code unless the other labels are fractions; "name": any other text, and so a code
        with a leading zero (`007`); "missing": no label.
      text: the label as text; "" for null and NaN. A whole number has its usual form, so that 3 and "3.0" are one class.
      number: its value, or None if it is no number.
    """

    kind: Kind
    text: str
    number: int | float | None = None

    @property
    def is_signed(self) -> bool:
        """True for a number with a sign, other than -1."""
        return self.number is not None and self.number != WITHHELD and self.text[0] in "+-"


def read_labels(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Label]]:
    """The labels of each split. Raises InputError on a value that cannot be a label; the message has its split and row."""
    known: dict[tuple[type, Any], Label] = {}  # True == 1 == 1.0, so the type is part of the key
    read: dict[str, list[Label]] = {}
    for where, raw in columns.items():
        labels = read[where] = []
        for row, value in enumerate(raw):
            if not isinstance(value, str | int | float | None):
                lists = ", or --task multi-label, which reads lists of classes" if isinstance(value, list) else ""
                raise InputError(
                    f"{where}, row {row + 1}: the label {value!r} is neither a number nor a name; give another data.label_column{lists}"
                )
            key = (type(value), value)
            if key not in known:
                known[key] = _read(value)
            labels.append(known[key])
    return read


def _read(value: str | float | None) -> Label:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return Label("missing", "")
    if isinstance(value, bool):
        return Label("name", str(value))
    if isinstance(value, int) or (isinstance(value, float) and value == int(value)):
        return Label("integer", str(int(value)), int(value))
    if isinstance(value, float):
        return Label("fraction", str(value), value)
    text = value.strip()
    if text.casefold() in _MISSING:
        return Label("missing", text)
    if whole := _WHOLE.fullmatch(text):
        return Label("integer", whole[1], int(whole[1]))
    number = float(text) if _ANY_NUMBER.fullmatch(text) else None
    if number is None or not math.isfinite(number) or not _NUMBER.fullmatch(text):
        return Label("name", text, number)
    return Label("fraction" if number != int(number) else "number", text, number)


def rows_with_label(
    columns: Mapping[str, Sequence[Any]],
    labels: Mapping[str, Sequence[Label]],
    *,
    numbers: bool,
    names: Sequence[str],
    drop: bool,
) -> dict[str, list[int]]:
    """The rows that have a label, by split.

    -1 is a label among numbers (`numbers`), among other labels with a sign (-2, +1), and if it is one of the `names` of the
    classes. In the last case `-`, `null` and `nan` are labels too.

    Args:
      columns: the labels as they are in the files.
      labels: the same labels, read.
      numbers: True if the labels are numbers to predict.
      names: the names of the classes, if they are given.
      drop: True if rows without a label are left out.

    Raises:
      InputError: a label is missing and `drop` is False, or no row of a split has one.
    """
    distinct = {label for column in labels.values() for label in column}
    minus_one_counts = numbers or str(WITHHELD) in names or any(label.is_signed for label in distinct)

    def is_missing(label: Label) -> bool:
        if label.kind == "missing":
            return not label.text or label.text not in names
        return label.kind == "integer" and label.number == WITHHELD and not minus_one_counts

    missing = {label for label in distinct if is_missing(label)}
    kept = {}
    for where, column in labels.items():
        rows = [row for row, label in enumerate(column) if label not in missing]
        first = next((row for row, label in enumerate(column) if label in missing), None)
        if first is not None and not rows:
            raise InputError(f"{where}: none of its {len(column)} rows has a label; give another data.label_column")
        if first is not None and not drop:
            raise InputError(
                _missing(where, first, columns[where][first], column[first], len(column) - len(rows), len(column))
            )
        kept[where] = rows
    return kept


def _missing(where: str, row: int, value: Any, label: Label, number: int, of: int) -> str:
    others = f", as in {number} of {of} rows" if number > 1 else ""
    a_class = f"; if {label.text} is a class, list all classes in data.label_names" if label.text else ""
    return (
        f"{where}, row {row + 1}: the label is missing ({value!r}){others}; leave such rows out with data.drop_unlabelled true, "
        f"or fill them in{a_class}"
    )
