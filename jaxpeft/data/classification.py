"""Classification and regression of sentences and pairs: rows are batched by length, in a few static shapes.

A batch is as long as its bucket, so the step compiles once per bucket. Rows of similar length share a batch, so little
is computed on padding. Order and batches are a pure function of (seed, micro-step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, Self

import numpy as np

from jaxpeft.data.order import FILL, cut, num_batches, order_rng, shape_rng
from jaxpeft.data.splits import HOLD_OUT_SEED
from jaxpeft.data.token_cache import Chunk, Origin, TokenCache, tokenised
from jaxpeft.errors import InputError

Batch = dict[str, np.ndarray]

BUCKET_LENGTHS = (16, 32, 64, 128, 256, 512)
_TEXTS_PER_CALL = 1024
# Consecutive batches of one bucket share a dispatch: four save the host work, and more would mix the epoch less.
_BATCHES_PER_RUN = 4


@dataclass(frozen=True, eq=False)
class Encoded:
    """Token ids of rows of different lengths, concatenated.

    Attributes:
      input_ids: `[tokens]` int32, all the rows.
      token_type_ids: `[tokens]` int32, 1 in the second text of a pair (if the model distinguishes the two).
      offsets: `[rows + 1]` int64; row i is `input_ids[offsets[i]:offsets[i + 1]]`.
      num_truncated: number of rows that were cut to `max_length`.
      max_length: maximum tokens per row.
      pad_token_id: id that pads a row in a batch.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    num_truncated: int
    max_length: int
    pad_token_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, including special ones: `[rows]` int64."""
        return np.diff(self.offsets)


def encode_texts(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    tokenizer: Any,
    *,
    max_length: int,
    truncate: bool = True,
    cache: TokenCache | None = None,
) -> Encoded:
    """Tokenise texts or pairs of texts, with the tokenizer's special tokens.

    Rows longer than `max_length` tokens are cut (a pair at its longer text) and counted in `num_truncated`. With
    `truncate=False` the first of them raises InputError. This function does not know the model's own limit. `cache` keeps the
    rows for later calls, if `texts` are a `TextColumn`.
    """
    if max_length < 3:
        raise InputError(
            f"data.max_length {max_length} leaves no room for a token between the special tokens; give at least 3"
        )
    if pairs is not None and len(pairs) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(pairs)} pairs; give one pair per text")
    origin = Origin("texts", (texts,) if pairs is None else (texts, pairs), tokenizer, max_length)
    make = partial(_chunks_of_texts, texts, pairs, tokenizer, max_length, truncate)
    rows = tokenised(origin, ("input_ids", "token_type_ids"), make, cache if truncate else None)
    ids, types = rows.tokens["input_ids"], rows.tokens["token_type_ids"]
    return Encoded(ids, types, rows.offsets, rows.num_truncated, max_length, tokenizer.pad_token_id)


def _chunks_of_texts(
    texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, max_length: int, truncate: bool
) -> Iterator[Chunk]:
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        rows = slice(start, start + _TEXTS_PER_CALL)
        # First without a limit, to count the rows that are too long.
        chunk = _encode(texts[rows], None if pairs is None else pairs[rows], tokenizer)
        too_long = [row for row, tokens in enumerate(chunk["input_ids"]) if len(tokens) > max_length]
        if too_long and not truncate:
            found, row = len(chunk["input_ids"][too_long[0]]), start + too_long[0] + 1
            raise InputError(
                f"row {row} has {found} tokens, data.max_length is {max_length}; raise it or allow truncation"
            )
        if too_long:
            chunk = _encode(texts[rows], None if pairs is None else pairs[rows], tokenizer, max_length)
        names = ("input_ids", "token_type_ids")
        tokens = {name: np.fromiter(chain.from_iterable(chunk[name]), np.int32) for name in names}
        yield Chunk(tokens, np.fromiter(map(len, chunk["input_ids"]), np.int64), len(too_long))


def _encode(texts: Sequence[str], pairs: Sequence[str] | None, tokenizer: Any, max_length: int | None = None) -> Any:
    limit = {} if max_length is None else {"truncation": "longest_first", "max_length": max_length}
    # verbose=False: transformers would warn about long rows, which the caller counts itself.
    return tokenizer(
        list(texts), None if pairs is None else list(pairs), return_token_type_ids=True, verbose=False, **limit
    )


def cap_buckets(bucket_lengths: Sequence[int], max_length: int) -> tuple[int, ...]:
    """The bucket lengths below `max_length` in ascending order, followed by `max_length`."""
    return (*sorted({length for length in bucket_lengths if length < max_length}), max_length)


def bucketed_batches(
    bucket_of_row: np.ndarray, batch_size: int, rng: np.random.Generator, shapes: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One epoch's batches. Each row is in exactly one of them.

    Rows are grouped by bucket in a random order. Rows that do not fill a batch move up to the next larger bucket, so
    only the largest bucket can end in an incomplete batch. Then the batches are shuffled in groups of four of one
    bucket, because consecutive batches of one shape are computed in one dispatch.

    Args:
      bucket_of_row: `[rows]` int, the smallest bucket that fits the row.
      batch_size: rows per batch.
      rng: decides which rows share a batch, and their order.
      shapes: decides the order of the buckets. Nothing else does.

    Returns:
      The rows of each batch, `[micro-steps, batch_size]` int with -1 for no row, and its bucket, `[micro-steps]` int.
    """
    order = rng.permutation(len(bucket_of_row))
    largest = int(bucket_of_row.max())
    waiting = order[:0]
    batches, buckets = [], []
    for bucket in range(largest + 1):
        waiting = np.concatenate([waiting, order[bucket_of_row[order] == bucket]])
        # Only the largest bucket keeps an incomplete batch; the others pass their rest on.
        ready = len(waiting) if bucket == largest else len(waiting) // batch_size * batch_size
        batches.append(cut(waiting[:ready], batch_size))
        buckets.append(np.full(len(batches[-1]), bucket))
        waiting = waiting[ready:]
    # Groups of consecutive batches are numbered over all buckets. The stable sort by a random key keeps each together.
    first_runs = np.cumsum([0, *(num_batches(len(part), _BATCHES_PER_RUN) for part in batches)])
    runs = [first + np.arange(len(part)) // _BATCHES_PER_RUN for first, part in zip(first_runs, batches, strict=False)]
    shuffled = np.argsort(shapes.permutation(first_runs[-1])[np.concatenate(runs)], kind="stable")
    return np.concatenate(batches)[shuffled], np.concatenate(buckets)[shuffled]


@dataclass(frozen=True, eq=False)
class ClassificationData:
    """Encoded rows and their batches. Every method is a pure function of the fields and its arguments.

    Attributes:
      encoded: the rows' tokens.
      labels: `[rows]` int32, or float32 for regression; zeros if the labels are unknown.
      batch_size: rows per batch.
      bucket_lengths: possible lengths of a batch, ascending; the last is `max_length`.
      seed: the run's seed, which decides the training order.
    """

    encoded: Encoded
    labels: np.ndarray
    batch_size: int
    bucket_lengths: tuple[int, ...]
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch. One of them may be padded with rows of weight 0."""
        return num_batches(len(self.labels), self.batch_size)

    @property
    def num_truncated(self) -> int:
        """Number of rows that were cut to `max_length`."""
        return self.encoded.num_truncated

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The (batch, length) pairs of training, the same in every epoch. One program is compiled for each."""
        _, buckets = self._epoch(0)
        return {(self.batch_size, self.bucket_lengths[bucket]) for bucket in set(buckets.tolist())}

    def with_seed(self, seed: int) -> Self:
        """The same rows in the training order of another seed."""
        return replace(self, seed=seed)

    def sample(self, num_rows: int) -> Self:
        """At most `num_rows` of the rows, chosen at random with a fixed seed.

        The first rows of a file would not do: files are often sorted by label.
        """
        return self.take(self._sampled(num_rows))

    def _sampled(self, num_rows: int) -> np.ndarray:
        # Not the run's seed, so that runs of different seeds are validated on the same rows.
        return np.sort(np.random.default_rng(HOLD_OUT_SEED).permutation(len(self.labels))[:num_rows])

    def take(self, rows: np.ndarray) -> Self:
        """The given rows, `[n]` int with at least one, in that order."""
        texts = self._texts_of(rows, np)
        tokens = self.tokens_of(texts)
        encoded = replace(
            self.encoded,
            input_ids=self.encoded.input_ids[tokens],
            token_type_ids=self.encoded.token_type_ids[tokens],
            offsets=np.concatenate([[0], np.cumsum(self.encoded.lengths[texts])]),
        )
        return replace(self, encoded=encoded, labels=self.labels[rows])

    def tokens_of(self, texts: np.ndarray) -> np.ndarray:
        """The places of the tokens of the given texts in `encoded`, `[tokens]` int."""
        offsets = self.encoded.offsets
        return np.concatenate([np.arange(offsets[text], offsets[text + 1]) for text in texts])

    def train_batch(self, micro_step: int) -> Batch:
        """The batch of a micro-step, counted from 0 over all epochs.

        `input_ids`, `attention_mask`, `token_type_ids`: `[batch, bucket]` int32. `labels`: `[batch]` int32 or float32.
        `weights`: `[batch]` float32, 0 for the copies of row 0 that pad an epoch's incomplete batch.
        """
        return self.assemble(self.device_data, self.draw(micro_step), np)

    @cached_property
    def device_data(self) -> Batch:
        """Arrays shared by all batches, from which `assemble` gathers: all rows' tokens, their `offsets`, and `labels`."""
        return {
            "input_ids": self.encoded.input_ids,
            "token_type_ids": self.encoded.token_type_ids,
            # Compiled programs count in int32. Data with more tokens is too large for them, and its batches are made by numpy.
            "offsets": self.encoded.offsets.astype(np.int32 if self.encoded.offsets[-1] < 2**31 else np.int64),
            "labels": self.labels,
        }

    def draw(self, micro_step: int) -> Batch:
        """Indices of the batch of a micro-step: `rows`, `[batch]` int32 (-1: none), and `columns`, 0 to bucket - 1."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        rows, buckets = self._epoch(epoch)
        return self._draw(rows[index], self.bucket_lengths[buckets[index]])

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a `draw`, in arrays of the namespace `xp`: numpy, or jax.numpy inside a compiled program."""
        rows = xp.maximum(draw["rows"], 0)  # FILL reads row 0, with weight 0
        texts = self._texts_of(rows, xp)
        inside, tokens = tokens_of(device_data["offsets"], texts, draw["columns"], xp)
        return {
            "input_ids": xp.where(inside, device_data["input_ids"][tokens], self.encoded.pad_token_id).astype(xp.int32),
            "attention_mask": inside.astype(xp.int32),
            "token_type_ids": xp.where(inside, device_data["token_type_ids"][tokens], 0).astype(xp.int32),
            "labels": device_data["labels"][rows],
            "weights": (draw["rows"] != FILL).astype(xp.float32),
        }

    def eval_batches(self) -> Iterator[Batch]:
        """Every row once, sorted by length. Batches are as in `train_batch`, with `rows`: `[batch]` int32 in addition.

        `rows` is -1 for padding and restores the order: `predictions[rows[rows >= 0]] = outputs[rows >= 0]`.
        """
        # By length, so that little is computed on padding.
        for rows in cut(np.argsort(self._row_lengths, kind="stable"), self.batch_size):
            bucket = self._bucket_of_row[rows[rows != FILL]].max()
            draw = self._draw(rows, self.bucket_lengths[bucket])
            yield {**self.assemble(self.device_data, draw, np), "rows": draw["rows"]}

    def _texts_of(self, rows: Any, xp: Any) -> Any:
        """The encoded texts of `rows`, in their order: here one for each row."""
        return rows

    @property
    def _row_lengths(self) -> np.ndarray:
        """Tokens of the longest text of each row."""
        return self.encoded.lengths

    @cached_property
    def _bucket_of_row(self) -> np.ndarray:
        return np.searchsorted(self.bucket_lengths, self._row_lengths)

    # A mutable cell, because the dataclass is frozen.
    @cached_property
    def _last_epoch(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """One epoch's batches. The last answer is kept, because every micro-step of an epoch asks for the same."""
        plan = self._last_epoch.get(epoch)
        if plan is None:
            plan = bucketed_batches(self._bucket_of_row, self.batch_size, order_rng(self.seed, epoch), shape_rng(epoch))
            self._last_epoch.clear()
            self._last_epoch[epoch] = plan
        return plan

    def _draw(self, rows: np.ndarray, length: int) -> Batch:
        return {"rows": rows.astype(np.int32), "columns": np.arange(length, dtype=np.int32)}


def tokens_of(offsets: Any, rows: Any, columns: Any, xp: Any) -> tuple[Any, Any]:
    """Which places of a batch hold a token, `[batch, columns]` bool, and the index of that token; at padding the index is 0."""
    starts = offsets[rows]
    inside = columns < (offsets[rows + 1] - starts)[:, None]
    return inside, xp.where(inside, starts[:, None] + columns, 0)


def classification_data(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: np.ndarray | None,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    bucket_lengths: Sequence[int] = BUCKET_LENGTHS,
    truncate: bool = True,
    cache: TokenCache | None = None,
) -> ClassificationData:
    """Encode texts as `ClassificationData`.

    Args:
      texts: one text per row.
      pairs: the second text of each row, or None.
      labels: `[rows]` int class ids or float targets; None (for prediction) gives zeros.
      tokenizer: a transformers tokenizer.
      max_length: maximum tokens per row, including special ones.
      batch_size: rows per batch.
      seed: the run's seed, 0 or above; decides the training order.
      bucket_lengths: possible lengths of a batch. Those above `max_length` are dropped, and `max_length` is added.
      truncate: if False, a row longer than `max_length` is an error.
      cache: keeps the rows for later calls, if `texts` are a `TextColumn`.

    Raises:
      InputError: there are no rows, the columns differ in length, the batch size is below 1, or a row is too long.
    """
    if not texts:
        raise InputError("there are no texts to classify; give at least one row")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is too small; give at least 1")
    if labels is not None and len(labels) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(labels)} labels; give one label per text")
    encoded = encode_texts(texts, pairs, tokenizer, max_length=max_length, truncate=truncate, cache=cache)
    values = np.zeros(len(texts), np.int32) if labels is None else np.asarray(labels)
    dtype = np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32
    return ClassificationData(encoded, values.astype(dtype), batch_size, cap_buckets(bucket_lengths, max_length), seed)
