"""Rows for token classification: windows over sentences of words, with the label of each word at its first token.

A sentence with more tokens than a row has room for is read in overlapping windows, so that nothing is cut. A word has a label, and an
answer, in one window only: in the one in which its first token has most tokens around it (of equal ones, in the first). The end of a
window counts as an edge only if the sentence goes on there. So every word with a token counts once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from jaxpeft.data.classification import BUCKET_LENGTHS, Batch, ClassificationData, Encoded, cap_buckets, tokens_of
from jaxpeft.data.splits import HOLD_OUT_SEED
from jaxpeft.data.token_cache import TokenCache, TokenRows
from jaxpeft.data.windows import windows
from jaxpeft.data.words import encode_words, special_tokens
from jaxpeft.errors import InputError

DOC_STRIDE = 32
"""Tokens that consecutive windows share, if nothing else is asked for; but at most half of a window."""


@dataclass(frozen=True, eq=False)
class TokenData(ClassificationData):
    """Windows over sentences, and their batches, which are made as those of `ClassificationData`.

    Attributes:
      labels: `[rows]` int32, the sentence of each window.
      word_of_token: `[tokens]` int32: for the token at which a word has its label, the number of the word, counted over all sentences;
        -1 for all others.
      tags: `[words]` int32, the class ids of all words; zeros if they are unknown.
      word_offsets: `[sentences + 1]` int64; the words of sentence i are `word_offsets[i]` to `word_offsets[i + 1]` - 1.
      label_names: the names of the classes in the order of their ids, or None.
    """

    word_of_token: np.ndarray
    tags: np.ndarray
    word_offsets: np.ndarray
    label_names: tuple[str, ...] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each thing that a reader might not expect of these rows."""
        windows_of = np.bincount(self.labels, minlength=len(self.word_offsets) - 1)
        number, lost = int((windows_of > 1).sum()), len(self.tags) - int((self.word_of_token >= 0).sum())
        notes = []
        if number:
            sentences = "sentence is" if number == 1 else "sentences are"
            notes.append(
                f"{number} {sentences} longer than {self.encoded.max_length} tokens, and read in {windows_of[windows_of > 1].sum()} windows"
            )
        if lost:
            notes.append(
                f"the tokenizer drops {lost} word{'s' if lost > 1 else ''} (empty, or without a character that it knows), "
                f"which count as {'words' if lost > 1 else 'a word'} with the answer O"
            )
        return tuple(notes)

    @cached_property
    def device_data(self) -> Batch:
        """As in `ClassificationData`; `labels` are `[tokens]` int32, -1 at tokens without a label."""
        labels = np.where(self.word_of_token >= 0, self.tags[self.word_of_token], -1).astype(np.int32)
        return {
            "input_ids": self.encoded.input_ids,
            "token_type_ids": self.encoded.token_type_ids,
            "offsets": self.encoded.offsets.astype(np.int32 if self.encoded.offsets[-1] < 2**31 else np.int64),
            "labels": labels,
        }

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """As in `ClassificationData`; `labels` and `weights` are `[batch, bucket]`. Tokens with a word's label have the weight 1."""
        rows = xp.maximum(draw["rows"], 0)
        inside, tokens = tokens_of(device_data["offsets"], rows, draw["columns"], xp)
        # The labels of rows are not asked for here, so any array of one per row will do.
        batch = super().assemble({**device_data, "labels": device_data["offsets"]}, draw, xp)
        labels = xp.where(inside, device_data["labels"][tokens], -1)
        weights = (labels >= 0) & (batch["weights"] > 0)[:, None]
        return {**batch, "labels": xp.maximum(labels, 0), "weights": weights.astype(xp.float32)}

    def sample(self, num_rows: int) -> TokenData:
        """Whole sentences with at most `num_rows` windows, but at least one sentence, chosen at random with a fixed seed."""
        number = len(self.word_offsets) - 1
        windows_of = np.bincount(self.labels, minlength=number)
        order = np.random.default_rng(HOLD_OUT_SEED).permutation(number)
        order = order[windows_of[order] > 0]
        fitting = max(1, int((np.cumsum(windows_of[order]) <= num_rows).sum()))
        chosen = np.sort(order[:fitting])
        rows = np.flatnonzero(np.isin(self.labels, chosen))
        tokens = _joined(self.encoded.offsets[rows], self.encoded.offsets[rows + 1])
        words = _joined(self.word_offsets[chosen], self.word_offsets[chosen + 1])
        renumbered = np.full(len(self.tags) + 1, -1, np.int32)  # the last one is that of tokens without a word
        renumbered[words] = np.arange(len(words))
        encoded = replace(
            self.encoded,
            input_ids=self.encoded.input_ids[tokens],
            token_type_ids=self.encoded.token_type_ids[tokens],
            offsets=_offsets(self.encoded.lengths[rows]),
        )
        return replace(
            self,
            encoded=encoded,
            labels=np.searchsorted(chosen, self.labels[rows]).astype(np.int32),
            word_of_token=renumbered[self.word_of_token[tokens]],
            tags=self.tags[words],
            word_offsets=_offsets(np.diff(self.word_offsets)[chosen]),
        )

    def places(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The words, `[n]` int, whose labels are at the given rows and columns, `[n]` int each."""
        return self.word_of_token[self.encoded.offsets[rows] + columns]

    def sentences(self, words: np.ndarray) -> list[np.ndarray]:
        """The values of all words, `[words]`, cut into sentences."""
        return np.split(words, self.word_offsets[1:-1])


def token_data(
    sentences: Sequence[Any],
    tags: Sequence[Sequence[int]] | np.ndarray | None,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    doc_stride: int | None = None,
    bucket_lengths: Sequence[int] = BUCKET_LENGTHS,
    label_names: tuple[str, ...] | None = None,
    cache: TokenCache | None = None,
) -> TokenData:
    """Encode sentences as `TokenData`. It has no rows if the tokenizer drops every word.

    Args:
      sentences: a list of words per sentence.
      tags: the class ids of the words of each, as a list or an array of tuples; None (for prediction) gives zeros.
      tokenizer: a fast transformers tokenizer.
      max_length: maximum tokens per row, including special ones.
      batch_size: rows per batch.
      seed: the run's seed, 0 or above; decides the training order.
      doc_stride: tokens that consecutive windows of a sentence share; None: 32, or half of a window if that is less.
      bucket_lengths: possible lengths of a batch. Those above `max_length` are dropped, and `max_length` is added.
      label_names: the names of the classes, or None.
      cache: keeps the tokens for later calls, if `sentences` are a `TextColumn`.

    Raises:
      InputError: `doc_stride` leaves no room in a row.
    """
    prefix, suffix = special_tokens(tokenizer)
    room = max_length - len(prefix) - len(suffix)
    stride = min(DOC_STRIDE, room // 2) if doc_stride is None else doc_stride
    if room < 1 or stride >= room:
        raise InputError(
            f"data.doc_stride {stride} does not fit into rows of {max_length} tokens, of which {max_length - room} are special; give at "
            f"most {max(room - 1, 0)}, or raise data.max_length"
        )
    tokens = encode_words(sentences, tokenizer, cache)
    lengths = [len(each) for each in (sentences if tags is None else tags)]
    word_offsets = _offsets(np.asarray(lengths, np.int64))
    rows = _cut(tokens, room, stride)
    ids, places, offsets = _with_special_tokens(tokens, rows, prefix, suffix)
    encoded = Encoded(ids, np.zeros_like(ids), offsets, 0, max_length, tokenizer.pad_token_id)
    return TokenData(
        encoded,
        rows[:, 0].astype(np.int32),
        batch_size,
        cap_buckets(bucket_lengths, max_length),
        seed,
        _words_of_tokens(tokens, rows, places, word_offsets),
        np.zeros(word_offsets[-1], np.int32) if tags is None else np.fromiter(chain.from_iterable(tags), np.int32),
        word_offsets,
        label_names,
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _joined(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The numbers from each start to its stop - 1, one range after the other: `[sum]` int64."""
    lengths = stops - starts
    return np.repeat(starts - _offsets(lengths)[:-1], lengths) + np.arange(lengths.sum())


def _cut(tokens: TokenRows, room: int, stride: int) -> np.ndarray:
    """The windows, `[rows, 3]` int64: the sentence, and the first token and the one behind the last, counted over all sentences.

    A sentence without tokens has no window.
    """
    found = [
        (number, first + start, first + stop)
        for number, (first, length) in enumerate(
            zip(tokens.offsets[:-1].tolist(), np.diff(tokens.offsets).tolist(), strict=True)
        )
        if length
        for start, stop in windows(length, room, stride)
    ]
    return np.asarray(found, np.int64).reshape(-1, 3)


def _with_special_tokens(
    tokens: TokenRows, rows: np.ndarray, prefix: Sequence[int], suffix: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of all rows, `[tokens]` int32; the token that each is, -1 for special ones; and the rows' offsets."""
    lengths = rows[:, 2] - rows[:, 1] + len(prefix) + len(suffix)
    offsets = _offsets(lengths)
    ids, places = np.zeros(offsets[-1], np.int32), np.full(offsets[-1], -1, np.int64)
    for i, special in enumerate(prefix):
        ids[offsets[:-1] + i] = special
    for i, special in enumerate(suffix):
        ids[offsets[1:] - len(suffix) + i] = special
    inner = _joined(offsets[:-1] + len(prefix), offsets[1:] - len(suffix))
    places[inner] = _joined(rows[:, 1], rows[:, 2])
    ids[inner] = tokens.tokens["input_ids"][places[inner]]
    return ids, places, offsets


def _words_of_tokens(tokens: TokenRows, rows: np.ndarray, places: np.ndarray, word_offsets: np.ndarray) -> np.ndarray:
    """`TokenData.word_of_token` of all rows. `places` is from `_with_special_tokens`."""
    words, first = tokens.tokens["words"], np.ones(tokens.offsets[-1], bool)
    first[1:] = words[1:] != words[:-1]
    first[tokens.offsets[:-1][np.diff(tokens.offsets) > 0]] = True
    inner = np.flatnonzero(places >= 0)
    token, row = places[inner], np.repeat(np.arange(len(rows)), rows[:, 2] - rows[:, 1])
    sentence, start, stop = rows[row].T
    # Where the sentence ends there is no more context to miss.
    far = np.iinfo(np.int64).max
    before = np.where(start > tokens.offsets[sentence], token - start, far)
    behind = np.where(stop < tokens.offsets[sentence + 1], stop - 1 - token, far)
    best = np.lexsort((row, -np.minimum(before, behind), token))
    decides = np.ones(len(best), bool)
    decides[1:] = token[best][1:] != token[best][:-1]
    chosen = best[decides]
    chosen = chosen[first[token[chosen]]]
    found = np.full(len(places), -1, np.int32)
    found[inner[chosen]] = word_offsets[sentence[chosen]] + words[token[chosen]]
    return found
