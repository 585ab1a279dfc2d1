"""Convert the labels of a dataset (ids, names, codes, numbers) to class ids or regression targets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from jaxpeft.data.label_values import Label, read_labels, rows_with_label
from jaxpeft.errors import InputError, did_you_mean

_NUMBERS = {"integer", "fraction", "number"}
_SEPARATORS = re.compile(r"\s*[,;|]\s*")
_MANY_LISTS = 0.1
_SHOWN = 20

Found = Mapping[str, Sequence[tuple[int, Label]]]
"""The labels of each split with their rows, without the missing ones."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The encoded labels of a dataset.

    Attributes:
      columns: by split, `[rows]` int32 class ids, or float32 for regression, of the rows that have a label.
      num_labels: the number of classes, 1 for regression.
      names: the classes' names in the order of their ids, or None.
      rows: by split, the rows that have a label, `[rows]` int.
      notes: one line for everything that a reader might not expect.
    """

    columns: Mapping[str, np.ndarray]
    num_labels: int
    names: tuple[str, ...] | None
    rows: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()


def encode_labels(
    columns: Mapping[str, Sequence[Any]],
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    base_names: Sequence[str] | None = None,
    drop_unlabelled: bool = False,
) -> Labels:
    """Convert raw labels to numbers by one rule for all splits.

    If all labels are numbers and one has decimals, they are regression targets, and so is every number if `num_labels` is
    1. Whole numbers that are exactly 0 to n - 1 in the first split are class ids. All other labels are names of classes.
    Names become ids: positions in `label_names` or, if it is None, among the sorted names of the first split. Numbers are
    sorted as numbers.

    If the names are among `base_names`, compared without regard to case, the classes and ids are the base's. Class ids
    get the base's names if there are as many.

    Args:
      columns: the labels of each split, train first. The keys name the splits in errors.
      num_labels: the number of classes, 1 for regression; None counts those of the first split.
      label_names: the names of the classes in the order of their ids, or None.
      base_names: the same of the pretrained model, or None.
      drop_unlabelled: leave out rows without a label, instead of refusing them.

    Raises:
      InputError: a label is missing, unknown or out of range. The message names the split, the row (from 1) and the
        value.
    """
    labels = read_labels(columns)
    kinds = {str(label.kind) for column in labels.values() for label in column} - {"missing"}
    free = num_labels is None and label_names is None
    numbers = num_labels == 1 or (free and "fraction" in kinds and kinds <= _NUMBERS)
    rows = rows_with_label(columns, labels, numbers=numbers, names=label_names or (), drop=drop_unlabelled)
    found = {where: [(row, labels[where][row]) for row in rows[where]] for where in labels}
    kept = {where: np.asarray(each, np.int64) for where, each in rows.items()}
    notes = [
        f"{len(column) - len(rows[where])} of {len(column)} rows of {where} have no label and are left out"
        for where, column in labels.items()
        if len(rows[where]) < len(column)
    ]
    if numbers:
        return Labels(_targets(found), 1, None, kept, tuple(notes))
    encoded = encode_classes(found, num_labels, label_names, base_names or ())
    notes += [*encoded.notes, *_lists(next(iter(found.values())))]
    return replace(encoded, rows=kept, notes=tuple(notes))


def encode_classes(
    found: Found, num_labels: int | None, label_names: Sequence[str] | None, base_names: Sequence[str]
) -> Labels:
    """The class ids of the labels `found`, by split. The other arguments and the errors are those of `encode_labels`.

    The result has no `rows`. Its notes are about classes of the base, and about those without a label in the first split.
    """
    encoded = with_base_names(_encode(found, num_labels, label_names), base_names)
    return replace(encoded, notes=(*encoded.notes, *_without_rows(encoded)))


def _targets(found: Found) -> dict[str, np.ndarray]:
    for where, column in found.items():
        for row, label in column:
            if label.number is None:
                raise InputError(
                    f"{where}, row {row + 1}: the label '{label.text}' is not a number; correct it, or set data.regression to false"
                )
    return {where: np.asarray([label.number for _, label in column], np.float32) for where, column in found.items()}


def _encode(found: Found, num_labels: int | None, label_names: Sequence[str] | None) -> Labels:
    kinds = {str(label.kind) for column in found.values() for _, label in column}
    names = None if label_names is None else tuple(label_names)
    if names is not None and num_labels is not None and num_labels != len(names):
        raise InputError(
            f"data.num_labels is {num_labels}, but data.label_names has {len(names)} names; make the two agree"
        )
    whole = kinds == {"integer"}
    if names is not None:
        texts = {label.text for column in found.values() for _, label in column}
        return _by_name(found, names) if not whole or texts <= set(names) else _by_id(found, len(names), names)
    first = {label for _, label in next(iter(found.values()))}
    names = _sorted_names(first)
    are_ids = whole and len(names) > 1 and {label.number for label in first} == set(range(len(names)))
    if num_labels is None:
        return _by_id(found, len(names), None) if are_ids else _by_name(found, names)
    if kinds <= {"integer", "fraction"} and (are_ids or not whole or len(names) != num_labels):
        return _by_id(found, num_labels, None)
    if num_labels != len(names):
        raise InputError(
            f"data.num_labels is {num_labels}, but the labels are {_listed(names)}; make the two agree, or list all classes in "
            "data.label_names"
        )
    return _by_name(found, names)


def _sorted_names(labels: set[Label]) -> tuple[str, ...]:
    """The distinct texts, sorted as numbers if they are whole numbers."""
    if all(label.kind == "integer" for label in labels):
        return tuple(str(number) for number in sorted({label.number for label in labels if label.number is not None}))
    return tuple(sorted({label.text for label in labels}))


def _by_name(found: Found, names: tuple[str, ...]) -> Labels:
    ids = {name: index for index, name in enumerate(names)}
    encoded = {}
    for where, column in found.items():
        for row, label in column:
            if label.text not in ids:
                near = "" if label.kind == "integer" else did_you_mean(label.text, names)
                hint = near or f"; known: {_listed(names)}; correct it, or list all classes in data.label_names"
                raise InputError(f"{where}, row {row + 1}: the label '{label.text}' is unknown{hint}")
        encoded[where] = np.asarray([ids[label.text] for _, label in column], np.int32)
    return Labels(encoded, len(names), names, {})


def _by_id(found: Found, count: int, names: tuple[str, ...] | None) -> Labels:
    encoded = {}
    for where, column in found.items():
        for row, label in column:
            if label.kind != "integer" or label.number is None or not 0 <= label.number < count:
                raise InputError(
                    f"{where}, row {row + 1}: the label {label.text} is not one of the ids 0 to {count - 1}; correct it, set "
                    "data.num_labels, or name the classes in data.label_names"
                )
        encoded[where] = np.asarray([label.number for _, label in column], np.int32)
    return Labels(encoded, count, names, {})


def with_base_names(found: Labels, base: Sequence[str]) -> Labels:
    """`found` with the classes and ids of the base, if its classes are among them."""
    ids = {name.casefold(): index for index, name in enumerate(base)}
    if len(ids) < len(base) or not base:
        return found
    if found.names is None:
        return replace(found, names=tuple(base)) if found.num_labels == len(base) else found
    folded = [name.casefold() for name in found.names]
    if len(set(folded)) < len(folded) or not ids.keys() >= set(folded):
        return replace(found, notes=(f"the base's own classes are others: {_listed(base)}",))
    to_base = np.asarray([ids[name] for name in folded], np.int32)
    note = f"the classes are the base's own: {_listed([f'{i} {name}' for i, name in enumerate(base)])}"
    columns = {where: to_base[column] for where, column in found.columns.items()}
    return Labels(columns, len(base), tuple(base), {}, (note,))


def check_two_classes(labels: Labels, where: str) -> None:
    """Raise InputError if the labels of `where` are all of one class, and nothing says that there are others."""
    if labels.num_labels == 1 and labels.names is not None:
        raise InputError(
            f"all labels of {where} are '{labels.names[0]}', and a classification needs at least two classes; if the other classes "
            "have no rows, list all of them in data.label_names"
        )


def _without_rows(labels: Labels) -> list[str]:
    """A note on the classes that have no row in the first split."""
    where, column = next(iter(labels.columns.items()))
    present = set(np.unique(column).tolist())
    number = labels.num_labels - len(present)
    if not number:
        return []
    absent = islice((i for i in range(labels.num_labels) if i not in present), _SHOWN)
    said = ", ".join(f"'{labels.names[i]}'" if labels.names else str(i) for i in absent)
    more = f" and {number - _SHOWN} more" if number > _SHOWN else ""
    return [
        f"no row of {where} has the class {said}{more}"
        if number == 1
        else f"no row of {where} has the classes {said}{more}"
    ]


def _lists(column: Sequence[tuple[int, Label]]) -> list[str]:
    """A note if many labels look like lists of classes ("a,b") that share their parts."""
    rows = Counter(label.text for _, label in column if label.kind == "name")
    parts = {text: set(filter(None, _SEPARATORS.split(text))) for text in rows}
    owners = Counter(part for each in parts.values() for part in each)
    lists = [text for text, each in parts.items() if len(each) > 1 and any(owners[part] > 1 for part in each)]
    number = sum(rows[text] for text in lists)
    if number < max(1, _MANY_LISTS * len(column)):
        return []
    return [
        f"{number} of {len(column)} labels look like lists of classes ('{lists[0]}'); a text has one class here, so each list is taken as "
        "a class of its own; --task multi-label reads lists"
    ]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
