"""Masked language modelling line by line: every text is a row of its own, and rows of similar length share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from jaxpeft.data.classification import bucketed_batches, cap_buckets
from jaxpeft.data.masked_lm import WIKITEXT_UNKNOWN, MaskedLMData, check_options, require_special_tokens
from jaxpeft.data.masks import Batch, num_masked
from jaxpeft.data.order import MASK_STREAM, order_rng, shape_rng
from jaxpeft.data.splits import HOLD_OUT_SEED
from jaxpeft.data.token_cache import Chunk, Origin, TokenCache, tokenised
from jaxpeft.data.whole_words import word_starts
from jaxpeft.errors import InputError

_TEXTS_PER_CALL = 1024


@dataclass(frozen=True, eq=False)
class MaskedLines(MaskedLMData):
    """Lines and their masks, as `MaskedLMData`, but batches are as long as a bucket.

    `blocks` are padded to the last of the `bucket_lengths`. `num_truncated` lines were cut to it.
    """

    bucket_lengths: tuple[int, ...] = ()
    num_truncated: int = 0

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The (batch, length) pairs of training, the same in every epoch. One program is compiled for each."""
        return {(self.batch_size, self.bucket_lengths[bucket]) for bucket in set(self._epoch(0)[1].tolist())}

    def draw(self, micro_step: int) -> Batch:
        """Indices of the batch of a micro-step: as in blocks, and `columns`, 0 to its length - 1."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        rows, buckets = self._epoch(epoch)
        drawn = self.masked_draw(rows[index], np.random.default_rng([self.seed, MASK_STREAM, micro_step]))
        return self._cut_draw(drawn, self.bucket_lengths[buckets[index]])

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a `draw`, in arrays of the namespace `xp`: numpy, or jax.numpy inside a compiled program."""
        rows = device_data["blocks"][draw["rows"]][:, : draw["columns"].shape[0]]
        return self.masked(rows, {key: value for key, value in draw.items() if key != "columns"}, xp)

    def eval_batches(self) -> Iterator[Batch]:
        """Every row once, sorted by length. The masks depend only on the lines, not on the seed or the batch size."""
        for rows, masks in self.evaluation_draws():
            length = self.bucket_lengths[self._bucket_of_row[rows].max()]
            yield self.assemble(self.device_data, {**self._cut_draw(masks, length), "rows": rows}, np)

    @property
    def evaluation_order(self) -> np.ndarray:
        """The rows by length, so that little is computed on padding."""
        return np.argsort(self._lengths, kind="stable")

    def sample(self, num_rows: int) -> MaskedLines:
        """At most `num_rows` of the rows, chosen at random with a fixed seed. The shortest ones, which come first, would not do."""
        chosen = np.random.default_rng(HOLD_OUT_SEED).permutation(len(self.blocks))[:num_rows]
        return replace(self, blocks=self.blocks[np.sort(chosen)])

    @cached_property
    def _lengths(self) -> np.ndarray:
        return (self.blocks != self.pad_token_id).sum(axis=1)

    @cached_property
    def _bucket_of_row(self) -> np.ndarray:
        return np.searchsorted(self.bucket_lengths, self._lengths)

    @cached_property
    def _last_epoch(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """One epoch's batches. The last answer is kept, because every micro-step of an epoch asks for the same."""
        if epoch not in self._last_epoch:
            plan = bucketed_batches(self._bucket_of_row, self.batch_size, order_rng(self.seed, epoch), shape_rng(epoch))
            self._last_epoch.clear()
            self._last_epoch[epoch] = plan
        return self._last_epoch[epoch]

    def _cut_draw(self, masks: Batch, length: int) -> Batch:
        """Masks for rows of `length` tokens. No position is lost: a shorter row has fewer of them, and they come first."""
        places = num_masked(length, self.ratio)
        cut_masks = {key: value[:, :places] if value.ndim == 2 else value for key, value in masks.items()}
        return {**cut_masks, "columns": np.arange(length, dtype=np.int32)}


def masked_lines(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    ratio: float,
    seed: int,
    bucket_lengths: Sequence[int],
    whole_words: bool = False,
    cache: TokenCache | None = None,
) -> MaskedLines:
    """Encode every text as a row of [CLS] + at most `length - 2` tokens + [SEP]. Texts without a token are left out.

    Args are those of `masked_lm_data`, and `bucket_lengths`: possible lengths of a batch; those above `length` are dropped, and
    `length` is added.

    Raises:
      InputError: as `masked_lm_data`.
    """
    check_options(ratio, batch_size, length)
    require_special_tokens(tokenizer)
    origin = Origin("lines", (texts,), tokenizer, length)
    rows = tokenised(origin, ("input_ids",), partial(_chunks, texts, tokenizer, length), cache)
    lengths = np.diff(rows.offsets)
    if not len(lengths):
        raise InputError(f"the {len(texts)} texts hold no tokens; give text that is not blank")
    blocks = np.full((len(lengths), length), tokenizer.pad_token_id, np.int32)
    blocks[np.arange(length) < lengths[:, None]] = rows.tokens["input_ids"]
    return MaskedLines(
        blocks=blocks,
        batch_size=batch_size,
        ratio=ratio,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        seed=seed,
        word_starts=word_starts(tokenizer) if whole_words else None,
        bucket_lengths=cap_buckets(bucket_lengths, length),
        num_truncated=rows.num_truncated,
    )


def _chunks(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[Chunk]:
    unknown = tokenizer.unk_token or WIKITEXT_UNKNOWN
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = [text.replace(WIKITEXT_UNKNOWN, unknown) for text in texts[start : start + _TEXTS_PER_CALL]]
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        kept = [tokens[: length - 2] for tokens in encoded if tokens]
        framed = [[tokenizer.cls_token_id, *tokens, tokenizer.sep_token_id] for tokens in kept]
        num_truncated = sum(len(tokens) > length - 2 for tokens in encoded)
        ids = np.asarray([token for tokens in framed for token in tokens], np.int32)
        yield Chunk({"input_ids": ids}, np.asarray([len(tokens) for tokens in framed], np.int64), num_truncated)
