"""Pairs of a query and a text, with a score: rows of the same query stay together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np

from jaxpeft.data.classification import ClassificationData
from jaxpeft.data.label_values import WITHHELD, read_labels, rows_with_label
from jaxpeft.data.labels import Labels
from jaxpeft.data.sources import ReadOptions
from jaxpeft.data.splits import HELD_OUT_FRACTION, HOLD_OUT_SEED, Split, take
from jaxpeft.errors import InputError

_TRUTH = {"true": 1, "false": 0}
RELEVANT = 0.5
"""A text is relevant if its label is at least this."""


def encode_scores(raw: Mapping[str, Sequence[Any]], options: ReadOptions) -> Labels:
    """Convert labels to scores from 0 to 1: numbers, or true and false. -1 is a label that is withheld, as in GLUE.

    Args:
      raw: the labels of each split as they are in its column, train first. The keys name the splits in errors.
      options: the flags.

    Returns:
      labels with columns `[rows]` float32.

    Raises:
      InputError: a label is missing, or is not a number from 0 to 1. The message names the split, the row (from 1) and the value.
    """
    values = {where: [_number(value) for value in column] for where, column in raw.items()}
    labels = read_labels(values)
    kept = rows_with_label(raw, labels, numbers=True, names=(), drop=options.drop_unlabelled)
    columns, notes = {}, []
    for where, rows in kept.items():
        for row in rows:
            number = labels[where][row].number
            if number is None or not 0 <= number <= 1:
                raise InputError(
                    f"{where}, row {row + 1}: the label {raw[where][row]!r} is not a number from 0 to 1; correct it, or give another "
                    "data.label_column"
                )
        columns[where] = np.asarray([labels[where][row].number for row in rows], np.float32)
        if len(rows) < len(raw[where]):
            number_left_out = len(raw[where]) - len(rows)
            notes.append(f"{number_left_out} of {len(raw[where])} rows of {where} have no label and are left out")
    return Labels(columns, 1, None, {where: np.asarray(rows, np.int64) for where, rows in kept.items()}, tuple(notes))


def _number(value: Any) -> Any:
    text = str(value).strip().casefold()
    return None if text == str(WITHHELD) else _TRUTH.get(text, value)


def query_ids(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, `[rows]` int64, equal for equal texts: 0, 1, … in the order in which they first appear."""
    known: dict[str, int] = {}
    return np.fromiter((known.setdefault(text, len(known)) for text in texts), np.int64, len(texts))


def is_ranked(labels: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Whether a query has texts to rank: at least two, and one of them is relevant. `[queries]` bool.

    Args:
      labels: `[rows]` from 0 to 1.
      queries: `[rows]` int, the number of each row's query.
    """
    return (np.bincount(queries) > 1) & (np.bincount(queries, labels >= RELEVANT) > 0)


def hold_out_queries(split: Split, where: str) -> tuple[Split, Split, str]:
    """Split train into (train, validation, a note): the rows of 10 % of the queries, at least one, become the validation split.

    The queries are a fixed random choice. No query is in both splits, so validation ranks texts for queries that are new.

    Raises:
      InputError: there are fewer than two queries.
    """
    queries = query_ids(split.texts)
    number = int(queries.max()) + 1
    if number < 2:
        raise InputError(
            f"{where} has only one query (first text), too few to hold one out for validation; give data.validation_file"
        )
    num_held = max(1, round(HELD_OUT_FRACTION * number))
    chosen = np.random.default_rng(HOLD_OUT_SEED).permutation(number)[:num_held]
    held = np.isin(queries, chosen)
    note = (
        f"no validation split: all rows of a fixed random {num_held} of {number} queries of {where} are held out ({held.sum()} of "
        f"{len(split)} rows)"
    )
    return take(split, np.flatnonzero(~held)), take(split, np.flatnonzero(held)), note


@dataclass(frozen=True, eq=False)
class QueryData(ClassificationData):
    """Encoded pairs and their batches. A sample has whole queries.

    Attributes:
      queries: `[rows]` int64, the number of each row's query.
    """

    queries: np.ndarray

    @classmethod
    def of(cls, data: ClassificationData, texts: Sequence[str]) -> Self:
        """`data` with the queries `texts`, one per row."""
        return cls(**{field.name: getattr(data, field.name) for field in fields(data)}, queries=query_ids(texts))

    def sample(self, num_rows: int) -> Self:
        """All rows of some queries, at most `num_rows` rows unless the first query has more. The choice is random with a fixed seed.

        The first query is one that is ranked (`is_ranked`), if there is one.
        """
        order = np.random.default_rng(HOLD_OUT_SEED).permutation(int(self.queries.max()) + 1)
        first = np.argmax(is_ranked(self.labels, self.queries)[order])
        order = np.concatenate([order[first : first + 1], np.delete(order, first)])
        sizes = np.bincount(self.queries)[order]
        number = max(1, int(np.searchsorted(np.cumsum(sizes), num_rows, side="right")))
        return self.take(np.flatnonzero(np.isin(self.queries, order[:number])))

    def take(self, rows: np.ndarray) -> Self:
        """The given rows, `[n]` int with at least one, in that order."""
        return replace(super().take(rows), queries=self.queries[rows])
