"""Texts with optional pairs and labels: one `Split` each for train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxpeft.data.texts import blank_rows, hash_texts, none_rows, rows_of, take_texts
from jaxpeft.errors import InputError

EmptyTexts = Literal["keep", "refuse", "drop"]
"""The ways to treat rows without a text."""

_ROWS_NAMED = 5
HELD_OUT_FRACTION = 0.1
HOLD_OUT_SEED = 0  # not the run's seed, so that runs of different seeds are evaluated on the same rows


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of one split.

    Attributes:
      texts: one text per row, or in token classification one list of words; those of files and of the hub are a `TextColumn`,
        which reads them from disk.
      pairs: the second text of each row (premise/hypothesis, question/answer), or None.
      labels: `[rows]` int32 class ids; `[rows]` or `[rows, classes]` float32; `[rows]` objects, each a tuple, if rows have labels of
        different lengths; or None if the rows are not labelled.
      negatives: a text of each row that does not belong to its first one, or None.
    """

    texts: Sequence[Any]
    pairs: Sequence[str] | None = None
    labels: np.ndarray | None = None
    negatives: Sequence[str] | None = None

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.texts)

    @property
    def columns(self) -> list[Sequence[str]]:
        """The columns of texts: the texts themselves, and pairs and negatives if the rows have them."""
        return [column for column in (self.texts, self.pairs, self.negatives) if column is not None]


@dataclass(frozen=True, eq=False)
class Splits:
    """A dataset, ready to be tokenised.

    Attributes:
      train: the rows to train on.
      validation: the rows to select on; held out from `train` if the source has none (`notes` says so).
      test: the rows to report on, or None.
      num_labels: the number of classes, 1 for regression, None without labels.
      label_names: the classes' names in the order of their ids, or None if they have no names.
      source: the origin of the rows, in one line for a reader.
      notes: one line for each change to the rows that the user did not ask for.
    """

    train: Split
    validation: Split
    test: Split | None
    num_labels: int | None
    label_names: tuple[str, ...] | None
    source: str
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of all rows, to check that all hosts read the same."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            if split is not None:
                digest.update(" ".join(map(hash_texts, split.columns)).encode())
                digest.update(b"" if split.labels is None else _label_bytes(split.labels))
        return digest.hexdigest()


def _label_bytes(labels: np.ndarray) -> bytes:
    return repr(labels.tolist()).encode() if labels.dtype == object else labels.tobytes()


def take(split: Split, rows: np.ndarray) -> Split:
    """The given rows (`[n]` int) of a split, in that order."""
    return Split(
        texts=take_texts(split.texts, rows),
        pairs=None if split.pairs is None else take_texts(split.pairs, rows),
        labels=None if split.labels is None else split.labels[rows],
        negatives=None if split.negatives is None else take_texts(split.negatives, rows),
    )


def without_empty(
    split: Split, where: str, empty: EmptyTexts, *, needs_every_text: bool = False
) -> tuple[Split, str | None]:
    """`split` without the rows that have no text, and a note if there are such rows.

    A pair has no text if both of its texts are blank, or if one is missing (None).

    Args:
      split: the rows.
      where: the origin of the rows, for messages.
      empty: "keep", "refuse" or "drop".
      needs_every_text: a row has no text if any of its texts is blank.

    Raises:
      InputError: there are empty rows, and `empty` is "refuse"; or all rows are empty.
    """
    blank = np.arange(0) if empty == "keep" else blank_rows(split.texts)
    if empty != "keep" and needs_every_text:
        blank = np.unique(np.concatenate([blank_rows(column) for column in split.columns]))
    elif split.pairs is not None and len(blank):
        blank = np.intersect1d(blank, blank_rows(split.pairs))
    if split.pairs is not None and empty == "drop" and not needs_every_text:  # else there is no None
        blank = np.unique(np.concatenate([blank, none_rows(split.texts), none_rows(split.pairs)]))
    if not len(blank):
        return split, None
    numbers = [str(rows_of(split.texts)[row] + 1) for row in blank[:_ROWS_NAMED]]
    others = f" and {len(blank) - _ROWS_NAMED} more" if len(blank) > _ROWS_NAMED else ""
    rows = f"row{'s' if len(blank) > 1 else ''} {', '.join(numbers)}{others}"
    missing = f" in one of their {len(split.columns)} columns" if needs_every_text else ""
    if empty == "refuse":
        raise InputError(
            f"{where}: {len(blank)} of {len(split)} rows have no text{missing} ({rows}); fill them in, or set "
            "data.drop_empty to true to leave them out"
        )
    if len(blank) == len(split):
        raise InputError(f"{where}: none of the {len(split)} rows has a text; give another data.text_column or file")
    note = f"{len(blank)} of {len(split)} rows of {where} have no text{missing} and are left out ({rows})"
    return take(split, np.delete(np.arange(len(split)), blank)), note


def hold_out(split: Split, where: str) -> tuple[Split, Split, str]:
    """Split train into (train, validation, a note): 10 % of the rows, at least one, become the validation split.

    Unlabelled rows are running text whose neighbours share sentences, so the last rows are held out in one piece.
    Labelled files are often sorted by label, so a fixed random choice is held out; of class ids, the same share of every
    class as nearly as possible. Raises InputError if there are fewer than two rows.
    """
    num_rows = len(split)
    if num_rows < 2:
        raise InputError(
            f"{where} has {num_rows} row, too few to hold one out for validation; give data.validation_file"
        )
    num_held = max(1, round(HELD_OUT_FRACTION * num_rows))
    stratified = ""
    if split.labels is None:
        held = np.arange(num_rows - num_held, num_rows)
    elif np.issubdtype(split.labels.dtype, np.integer):
        held, stratified = _stratified(split.labels, num_held), ", stratified by class"
    else:
        held = np.random.default_rng(HOLD_OUT_SEED).permutation(num_rows)[-num_held:]
    which = "the last" if split.labels is None else "a fixed random"
    note = f"no validation split: {which} {num_held} of {num_rows} rows of {where} are held out (10 %{stratified})"
    # Sorted, so that rows stay in the order of the source.
    return take(split, np.setdiff1d(np.arange(num_rows), held)), take(split, np.sort(held)), note


def _stratified(labels: np.ndarray, num_held: int) -> np.ndarray:
    """`num_held` rows, drawn with a fixed seed: of every class the same share, rounded so that the sum is right.

    A class keeps at least one row for training, if that leaves enough rows to hold out.
    """
    classes, counts = np.unique(labels, return_counts=True)
    limits = counts - 1 if (counts - 1).sum() >= num_held else counts
    shares = counts * num_held / len(labels)
    quotas = np.minimum(np.floor(shares).astype(int), limits)
    # The largest remainders are rounded up; of equal ones, that of the more frequent class.
    order = np.lexsort((-counts, quotas - shares))
    while (left := num_held - quotas.sum()) > 0:
        open_classes = [i for i in order if quotas[i] < limits[i]]
        quotas[open_classes[:left]] += 1
    rows = np.random.default_rng(HOLD_OUT_SEED).permutation(len(labels))
    return np.concatenate([rows[labels[rows] == c][:quota] for c, quota in zip(classes, quotas, strict=True) if quota])
