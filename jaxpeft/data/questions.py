"""From the tables of a dataset to questions, their contexts and their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft.data.columns import Columns, choose_columns, column_values
from jaxpeft.data.sources import ReadOptions, finished_splits
from jaxpeft.data.splits import HELD_OUT_FRACTION, HOLD_OUT_SEED, Split, Splits, take, without_empty
from jaxpeft.data.tables import Tables
from jaxpeft.data.texts import read_texts, rows_of
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

Answer = tuple[str, int]
"""A text, and the place of its first character in the context, counted in characters (Python's code points) from 0."""

NUM_OUTPUTS = 2
"""Logits of a token: that the answer starts with it, and that it ends with it."""

_NEAR = 2  # characters by which the offsets of old files are wrong
_ROWS_NAMED = 5


def question_splits(read: Tables, options: ReadOptions) -> Splits:
    """The splits of tables with a question, a context and answers in each row.

    The columns are `question`, `context` and `answers`, unless the options name others. A row's answers are an object with the lists
    `text` and `answer_start`, or a list of objects with one of each; no answers at all mean that the context does not hold one. The
    labels of a split are objects: for each question a tuple of `Answer`.

    Args:
      read: the tables.
      options: the flags. Blank questions and contexts are treated as `empty_texts` says, rows without answers (null) as
        `drop_unlabelled` says.

    Raises:
      InputError: a column does not exist, a text or an answer cannot be read, or an answer is not at its place in the context.
    """
    notes, splits = list(read.notes), {}
    for split, table in read.tables.items():
        where = read.where[split]
        columns = _columns(table, where, options)
        raw = None if columns.label is None else column_values(table, columns.label)
        if split == "test" and (raw is None or all(value is None for value in raw)):
            notes.append(f"{where} has no answers (not public): it is not used")
            continue
        if raw is None:
            raise InputError(
                f"{where} has no column 'answers'; columns: {', '.join(table.column_names)}; name it with data.label_column"
            )
        rows, more = _with_answers(_texts(table, columns, where, options), raw, table, where, options)
        splits[split] = rows
        notes += more
    if "validation" not in splits and (held_out := _hold_out(splits["train"], read.where["train"])):
        splits["train"], splits["validation"], note = held_out
        notes.append(note)
    return finished_splits(splits, read, notes, NUM_OUTPUTS, None)


def _hold_out(split: Split, where: str) -> tuple[Split, Split, str] | None:
    """Train and validation with different contexts, and a note; None if all questions are about one context."""
    assert split.pairs is not None
    number: dict[str, int] = {}
    context_of = np.array([number.setdefault(context, len(number)) for context in split.pairs])
    if len(number) < 2:
        return None
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(number))
    questions = np.cumsum(np.bincount(context_of)[order])
    # The contexts that reach the share together, but not all.
    most = min(int(np.searchsorted(questions, HELD_OUT_FRACTION * len(split))) + 1, len(number) - 1)
    held = np.isin(context_of, order[:most])
    note = (
        f"no validation split: {held.sum():,} of {len(split):,} questions of {where} are held out, all those of a fixed random "
        f"{most:,} of {len(number):,} contexts"
    )
    return take(split, np.flatnonzero(~held)), take(split, np.flatnonzero(held)), note


def questions_to_answer(table: Dataset, where: str, options: ReadOptions) -> Split:
    """The questions of a table and their contexts, without answers. Errors are as in `question_splits`."""
    split = _texts(table, _columns(table, where, options), where, options)
    return without_empty(split, where, options.empty_texts, needs_every_text=True)[0]


def has_unanswerable(splits: Splits) -> bool:
    """True if some question has no answer in its context, as in SQuAD 2.0."""
    given = (splits.train, splits.validation, splits.test)
    return any(
        not answers for split in given if split is not None and split.labels is not None for answers in split.labels
    )


def _columns(table: Dataset, where: str, options: ReadOptions) -> Columns:
    available = table.column_names
    label = options.label_column or ("answers" if "answers" in available else None)
    text, pair = options.text_column or "question", options.text_pair_column or "context"
    return choose_columns(available, where, text=text, pair=pair, label=label)


def _texts(table: Dataset, columns: Columns, where: str, options: ReadOptions) -> Split:
    assert columns.pair is not None
    allow_none = options.empty_texts == "drop"
    questions, contexts = (
        read_texts(table, name, where, allow_none=allow_none) for name in (columns.text, columns.pair)
    )
    return Split(questions, contexts)


def _with_answers(
    split: Split, raw: Sequence[Any], table: Dataset, where: str, options: ReadOptions
) -> tuple[Split, list[str]]:
    """`split` with its answers, less the rows that are left out, and the notes on these."""
    notes = []
    split, note = without_empty(split, where, options.empty_texts, needs_every_text=True)
    notes += [note] if note else []
    rows = np.asarray(rows_of(split.texts))
    missing = np.array([raw[row] is None for row in rows], bool)
    if missing.any():
        numbers = ", ".join(str(row + 1) for row in rows[missing][:_ROWS_NAMED])
        many = f"{missing.sum():,} of {len(rows):,} rows of {where} have no answers (null): row {numbers}"
        if not options.drop_unlabelled or missing.all():
            raise InputError(
                f"{many}; give the answers ([] if the context has none), or leave such rows out with data.drop_unlabelled true"
            )
        notes.append(f"{many}; they are left out")
        split, rows = take(split, np.flatnonzero(~missing)), rows[~missing]
    names = column_values(table, "id") if "id" in table.column_names else None
    labels = np.empty(len(rows), object)
    assert split.pairs is not None
    for i, (row, context) in enumerate(zip(rows.tolist(), split.pairs, strict=True)):
        place = f"{where}, row {row + 1}" + (f" (id {names[row]})" if names else "")
        labels[i] = _checked(_read(raw[row], place), context, place)
    none = sum(not answers for answers in labels)
    if none:
        notes.append(f"{none:,} of {len(labels):,} questions of {where} have no answer in their context (SQuAD 2.0)")
    return replace(split, labels=labels), notes


def _read(value: Any, place: str) -> tuple[Answer, ...]:
    """The answers of a row."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts, starts = value["text"], value.get("answer_start")
        if not isinstance(starts, list) or len(starts) != len(texts):
            raise InputError(
                f"{place}: the answers {str(value)[:60]} need as many of 'answer_start' as of 'text'; add or remove some"
            )
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        pairs = [(each.get("text"), each.get("answer_start")) for each in value]
    else:
        raise InputError(
            f"{place}: the answers are {str(value)[:60]!r}; they must be an object with the lists 'text' and 'answer_start' "
            "(a .json, .jsonl or .parquet file can hold one)"
        )
    for text, start in pairs:
        if not isinstance(text, str) or not text or not isinstance(start, int) or isinstance(start, bool):
            raise InputError(
                f"{place}: the answer {str(text)[:40]!r} with answer_start {start!r} needs a text and a whole number; "
                "a question without an answer has no texts ([])"
            )
    return tuple(pairs)


def _checked(answers: tuple[Answer, ...], context: str, place: str) -> tuple[Answer, ...]:
    """`answers`, each of which is in `context` at its place."""
    for text, start in answers:
        found = context[start : start + len(text)] if start >= 0 else ""
        if found == text:
            continue
        places = _places(text, context)
        near = [other for other in places if abs(other - start) <= _NEAR]
        if near:
            way = f"it begins at {near[0]}: set answer_start to that"
        elif places:
            way = f"it begins at {', '.join(map(str, places[:3]))}: set answer_start to the right one"
        else:
            way = "it is nowhere in the context: copy it from there, with the same letters and blanks"
        raise InputError(
            f"{place}: the answer {text!r} is not at answer_start {start}, which has {found!r}; {way} (characters count from 0)"
        )
    return answers


def _places(text: str, context: str) -> list[int]:
    """The places of `text` in `context`, ascending."""
    places, start = [], context.find(text)
    while start >= 0:
        places.append(start)
        start = context.find(text, start + 1)
    return places
