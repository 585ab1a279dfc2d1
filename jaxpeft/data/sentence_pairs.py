"""Rows of two or three texts for sentence embeddings: a text, one that belongs to it, and maybe one that does not.

The texts of a row follow each other in a batch, `[rows · texts, tokens]`, and all texts of a batch have one length, that of its bucket.
A row's bucket is that of its longest text. Equal texts have equal numbers, by which the loss knows which texts of a batch are no negatives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from jaxpeft.data.classification import BUCKET_LENGTHS, Batch, ClassificationData, Encoded, cap_buckets, encode_texts
from jaxpeft.data.columns import class_names
from jaxpeft.data.label_values import read_labels
from jaxpeft.data.labels import Labels, encode_labels
from jaxpeft.data.sources import ReadOptions, text_splits
from jaxpeft.data.splits import Split, Splits
from jaxpeft.data.tables import Tables
from jaxpeft.data.token_cache import TokenCache
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_USUAL = ("anchor", "positive", "negative")
"""The columns of pairs and triplets on the hub. The third one may be missing."""

_SCORE = "score"
"""The usual column of similarities, besides `label`."""


def read_sentence_pairs(read: Tables, options: ReadOptions) -> Splits:
    """The splits of tables with two texts in each row, and maybe a third one or a number.

    Without `text_column`, the columns are `anchor`, `positive` and, if there is one, `negative`, or those of a GLUE task. A column of
    labels holds numbers: how similar the two texts are.

    Raises:
      InputError: there is no second text, the labels are no numbers, a row has labels and a third text, or as `text_splits`.
    """
    options = options.for_dataset(read.name)
    train = read.tables["train"]
    options = _with_usual_columns(options, train.column_names)
    if options.label_column is None and _SCORE in train.column_names and "label" not in train.column_names:
        options = replace(options, label_column=_SCORE)
    where = read.where["train"]
    columns = options.columns_of(train, where)
    if columns.pair is None:
        raise InputError(
            f"{where}: sentence-embeddings needs two texts in each row, and only '{columns.text}' is known; "
            f"name the second column with data.text_pair_column; columns: {', '.join(train.column_names)}"
        )
    if columns.label is not None:
        _check_scores(train, columns.label, columns.negative, where)
    options = replace(options, num_labels=1, needs_every_text=True)
    if options.empty_texts == "keep":
        options = replace(options, empty_texts="refuse")
    return text_splits(read, options, _scores)


def questions_of(table: Dataset, where: str, options: ReadOptions) -> ReadOptions:
    """`options` with the columns of a table to answer: a single text in each row, or two if `text_pair_column` names the second."""
    alone = replace(options, text_pair_column=None, label_column=None, negative_column=None)
    text = _with_usual_columns(alone, table.column_names).columns_of(table, where).text
    return replace(alone, text_column=text, text_pair_column=options.text_pair_column)


def _with_usual_columns(options: ReadOptions, available: Sequence[str]) -> ReadOptions:
    if options.text_column is not None or not set(_USUAL[:2]) <= set(available):
        return options
    text, pair, negative = _USUAL
    found = options.negative_column or (negative if negative in available else None)
    return replace(options, text_column=text, text_pair_column=pair, negative_column=found)


def _check_scores(table: Dataset, label: str, negative: str | None, where: str) -> None:
    names = class_names(table, label)
    if names:
        raise InputError(
            f"{where}: column '{label}' holds classes ({', '.join(names)}), and sentence-embeddings reads numbers, larger for more similar "
            "texts; name such a column with data.label_column, or keep only the rows of texts that belong together, without labels"
        )
    if negative is not None:
        raise InputError(
            f"{where}: a row has a number ('{label}') or a third text ('{negative}'), not both; remove one of the columns"
        )


def _scores(raw: Mapping[str, Sequence[Any]], options: ReadOptions) -> Labels:
    for where, labels in read_labels(raw).items():
        for row, label in enumerate(labels):
            if label.kind == "name":
                raise InputError(
                    f"{where}, row {row + 1}: the label '{label.text}' is not a number; correct it, or name another column with "
                    "data.label_column"
                )
    return encode_labels(raw, num_labels=1, drop_unlabelled=options.drop_unlabelled)


@dataclass(frozen=True, eq=False)
class SentencePairData(ClassificationData):
    """Encoded rows of several texts and their batches. `encoded` has the texts of a row one after the other.

    Attributes:
      text_ids: `[rows, texts]` int32; equal numbers mean equal tokens.
    """

    text_ids: np.ndarray

    @property
    def texts_per_row(self) -> int:
        """Texts of a row."""
        return self.text_ids.shape[1]

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The (texts, length) pairs of training, the same in every epoch."""
        return {(rows * self.texts_per_row, length) for rows, length in super().batch_shapes}

    def sample(self, num_rows: int) -> Self:
        """At most `num_rows` of the rows, chosen at random with a fixed seed."""
        return replace(super().sample(num_rows), text_ids=self.text_ids[self._sampled(num_rows)])

    @cached_property
    def device_data(self) -> Batch:
        """As in classification, with `text_ids`."""
        return {**super().device_data, "text_ids": self.text_ids}

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """As in classification: tokens are `[rows · texts, bucket]`, `labels` and `weights` `[rows]`; and `text_ids: [rows · texts]`."""
        ids = device_data["text_ids"][xp.maximum(draw["rows"], 0)].reshape(-1)
        return {**super().assemble(device_data, draw, xp), "text_ids": ids}

    def _texts_of(self, rows: Any, xp: Any) -> Any:
        return (rows[:, None] * self.texts_per_row + xp.arange(self.texts_per_row, dtype=rows.dtype)).reshape(-1)

    @property
    def _row_lengths(self) -> np.ndarray:
        return self.encoded.lengths.reshape(-1, self.texts_per_row).max(1)


def sentence_pair_data(
    split: Split,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    bucket_lengths: Sequence[int] = BUCKET_LENGTHS,
    cache: TokenCache | None = None,
) -> SentencePairData:
    """Encode the texts of each row, one, two or three, as `SentencePairData`.

    Args:
      split: the rows. Labels are optional.
      tokenizer: a transformers tokenizer.
      max_length: maximum tokens per text, including special ones.
      batch_size: rows per batch.
      seed: the run's seed, 0 or above; decides the training order.
      bucket_lengths: possible lengths of a batch. Those above `max_length` are dropped, and `max_length` is added.
      cache: keeps the tokens for later calls, if texts are a `TextColumn`.

    Raises:
      InputError: there are no rows, the columns differ in length, or the batch size is below 1.
    """
    columns = split.columns
    if not split.texts:
        raise InputError("there are no texts to embed; give at least one row")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is too small; give at least 1")
    if len({len(column) for column in columns}) > 1:
        raise InputError(
            f"columns of {' and '.join(str(len(column)) for column in columns)} texts; give as many in each"
        )
    encoded = _interleaved(
        [encode_texts(column, None, tokenizer, max_length=max_length, cache=cache) for column in columns]
    )
    labels = np.zeros(len(split)) if split.labels is None else split.labels
    return SentencePairData(
        encoded,
        np.asarray(labels, np.float32),
        batch_size,
        cap_buckets(bucket_lengths, max_length),
        seed,
        _numbered(encoded).reshape(-1, len(columns)),
    )


def _interleaved(columns: Sequence[Encoded]) -> Encoded:
    """The encoded texts of several columns row by row. `num_truncated` counts texts."""
    if len(columns) == 1:
        return columns[0]
    lengths = np.stack([column.lengths for column in columns], axis=1)
    offsets = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])
    ids, types = np.empty(offsets[-1], np.int32), np.zeros(offsets[-1], np.int32)
    for number, column in enumerate(columns):
        # Where the tokens of this column go: each text's tokens move by as much as the text does.
        moved = np.repeat(offsets[:-1].reshape(-1, len(columns))[:, number] - column.offsets[:-1], column.lengths)
        places = np.arange(len(column.input_ids)) + moved
        ids[places], types[places] = column.input_ids, column.token_type_ids
    truncated = sum(column.num_truncated for column in columns)
    return replace(columns[0], input_ids=ids, token_type_ids=types, offsets=offsets, num_truncated=truncated)


def _numbered(encoded: Encoded) -> np.ndarray:
    """A number for each text, `[texts]` int32, the same for texts of the same tokens."""
    ids, bounds = encoded.input_ids, pairwise(encoded.offsets)
    digests = [blake2b(ids[start:end].tobytes(), digest_size=8).digest() for start, end in bounds]
    return np.unique(np.frombuffer(b"".join(digests), np.uint64), return_inverse=True)[1].astype(np.int32)
