"""Masked language modelling: text in blocks of one length, and masks that are a pure function of (seed, micro-step).

The masks are BERT's (Devlin et al. 2018, section 3.1): a share of the tokens is chosen, of which 80 % become [MASK],
10 % a random token and 10 % stay. Unlike BERT's, they are drawn anew for every epoch (RoBERTa's dynamic masking). The
number of masked positions is the same for every row, so the model computes logits only at those positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np

from jaxpeft.data.order import FILL, MASK_STREAM, cut, epoch_order, num_batches
from jaxpeft.data.token_cache import Chunk, Origin, TokenCache, tokenised
from jaxpeft.errors import InputError

Batch = dict[str, np.ndarray]

WIKITEXT_UNKNOWN = "<unk>"
EVALUATION_SEED = 20181011  # constant, so that runs of different seeds are evaluated on the same masks
_TEXTS_PER_CALL = 1024
_ROWS_PER_DRAW = 1024  # rows per draw of evaluation masks: not the batch size, which must not change the masks


def make_blocks(texts: Sequence[str], tokenizer: Any, *, length: int, cache: TokenCache | None = None) -> np.ndarray:
    """Join the texts and cut them into rows of [CLS] + `length - 2` tokens + [SEP].

    WikiText's literal `<unk>` becomes the tokenizer's unknown token. The incomplete last row is padded if it fills at
    least a quarter of the length, or if it is the only row. Otherwise it is dropped.

    Args:
      texts: any number of texts; blank ones add no tokens.
      tokenizer: a transformers tokenizer with [CLS], [SEP], [PAD] and [MASK].
      length: tokens per row, including special ones. This function does not know the model's own limit.
      cache: keeps the rows for later calls, if `texts` are a `TextColumn`.

    Returns:
      `[rows, length]` int32, read-only if it comes from the cache.

    Raises:
      InputError: there are no tokens, the length is below 3, or the tokenizer lacks one of the special tokens.
    """
    if length < 3:
        raise InputError(f"length {length} leaves no room for a token between [CLS] and [SEP]; give at least 3")
    _require_special_tokens(tokenizer)
    origin = Origin("blocks", (texts,), tokenizer, length)
    rows = tokenised(origin, ("input_ids",), partial(_chunks_of_blocks, texts, tokenizer, length), cache)
    return rows.tokens["input_ids"].reshape(-1, length)


def _chunks_of_blocks(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[Chunk]:
    body, num_full, left = length - 2, 0, np.zeros(0, np.int32)
    for tokens in _token_stream(texts, tokenizer):
        tokens = np.concatenate([left, tokens])
        cut_at = len(tokens) // body * body
        if cut_at:
            yield _framed(tokens[:cut_at].reshape(-1, body), tokenizer)
        num_full, left = num_full + cut_at // body, tokens[cut_at:]
    if len(left) and (num_full == 0 or 4 * (len(left) + 2) >= length):
        last = _framed(left[None], tokenizer).tokens["input_ids"]
        padding = np.full(length - len(last), tokenizer.pad_token_id, np.int32)
        yield Chunk({"input_ids": np.concatenate([last, padding])}, np.array([length]))
    elif num_full == 0:
        raise InputError(f"the {len(texts)} texts hold no tokens; give text that is not blank")


def _framed(bodies: np.ndarray, tokenizer: Any) -> Chunk:
    """Rows of [CLS] + `bodies`, `[rows, n]` int32, + [SEP]."""
    num_rows, width = bodies.shape
    blocks = np.empty((num_rows, width + 2), np.int32)
    blocks[:, 0], blocks[:, 1:-1], blocks[:, -1] = tokenizer.cls_token_id, bodies, tokenizer.sep_token_id
    return Chunk({"input_ids": blocks.reshape(-1)}, np.full(num_rows, width + 2))


def _require_special_tokens(tokenizer: Any) -> None:
    for role in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, f"{role}_id") is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no {role}; masked language modelling needs a BERT-like one"
            )


def _token_stream(texts: Sequence[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """The tokens of all texts without special tokens, `[n]` int32, in pieces."""
    unknown = tokenizer.unk_token or WIKITEXT_UNKNOWN
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = [text.replace(WIKITEXT_UNKNOWN, unknown) for text in texts[start : start + _TEXTS_PER_CALL]]
        # verbose=False: transformers would warn of texts above the model's limit, but they are cut into blocks anyway.
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield np.fromiter(chain.from_iterable(encoded["input_ids"]), np.int32)


def maskable(blocks: np.ndarray, tokenizer: Any) -> np.ndarray:
    """`[rows, length]` bool, True if a token may be masked, which excludes special tokens and the unknown token.

    The unknown token stands for thousands of words. It is easy to predict and would make the perplexity too good.
    """
    return _maskable(blocks, tokenizer.all_special_ids)


def _maskable(blocks: np.ndarray, special_ids: Sequence[int]) -> np.ndarray:
    return ~np.isin(blocks, special_ids)


def num_masked(length: int, ratio: float) -> int:
    """Masked positions per row: `ratio` of the tokens between [CLS] and [SEP], at least one."""
    return max(1, round(ratio * (length - 2)))


def mask_rows(rows: np.ndarray, can_mask: np.ndarray, *, pad_token_id: int, **options: Any) -> Batch:
    """Mask `round(ratio * maskable tokens)` tokens of each row: at least one if any may be masked, at most `num_positions`.

    Args:
      rows: `[batch, length]` int token ids.
      can_mask: `[batch, length]` bool, True if a token may be chosen.
      pad_token_id: the id of [PAD], which gets no attention.
      **options: the other arguments of `choose_masks`.

    Returns:
      `input_ids`, `attention_mask`: `[batch, length]` int32. `positions`: `[batch, P]` int32, ascending; unused ones
      are last and 0. `labels`: `[batch, P]` int32, the original ids. `weights`: `[batch, P]` float32, 1 or (unused) 0.
    """
    return _masked_batch(rows, choose_masks(rows, can_mask, **options), pad_token_id, np)


def choose_masks(
    rows: np.ndarray,
    can_mask: np.ndarray,
    *,
    rng: np.random.Generator,
    ratio: float,
    num_positions: int,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Sequence[int],
) -> Batch:
    """Choose the masked positions of each row and their replacements.

    Args:
      rows: `[batch, length]` int token ids.
      can_mask: `[batch, length]` bool, True if a token may be chosen.
      rng: decides the choice; the same state gives the same masks.
      ratio: the share of maskable tokens to choose, in (0, 1].
      num_positions: P, the static number of masked positions per row (`num_masked`).
      mask_token_id: the id of [MASK].
      vocab_size: random tokens are drawn from the ids 0 to `vocab_size - 1`.
      special_ids: ids that are never drawn as random tokens.

    Returns:
      `positions` and `weights` as in `mask_rows`, and `replacements`: `[batch, P]` int32, the new ids there.
    """
    positions, used = _choose_positions(can_mask, rng, ratio, num_positions)
    originals = np.take_along_axis(rows, positions, axis=1)
    kind = rng.random(originals.shape)
    # Without the special ids, so that a random token is never [MASK] or [SEP].
    words = np.delete(np.arange(vocab_size), [special for special in special_ids if special < vocab_size])
    random_ids = words[rng.integers(len(words), size=originals.shape)]
    chosen = np.select([kind < 0.8, kind < 0.9], [np.full_like(originals, mask_token_id), random_ids], originals)
    # An unused position points at token 0 and must not change it, whether that token is masked or not.
    first = np.where(used[:, :1] & (positions[:, :1] == 0), chosen[:, :1], rows[:, :1])
    return {
        "positions": positions.astype(np.int32),
        "replacements": np.where(used, chosen, first).astype(np.int32),
        "weights": used.astype(np.float32),
    }


def _masked_batch(rows: Any, masks: Batch, pad_token_id: int, xp: Any) -> dict[str, Any]:
    """The batch of token ids `rows` with `masks` applied. `xp` is the namespace of the arrays: numpy or jax.numpy."""
    positions, used = masks["positions"], masks["weights"] > 0
    rows = xp.asarray(rows, dtype=xp.int32)
    return {
        "input_ids": _with_values(rows, positions, masks["replacements"], xp),
        "attention_mask": (rows != pad_token_id).astype(xp.int32),
        "positions": positions,
        "labels": xp.where(used, xp.take_along_axis(rows, positions, axis=1), 0).astype(xp.int32),
        "weights": masks["weights"],
    }


def _with_values(rows: Any, positions: Any, values: Any, xp: Any) -> Any:
    """`rows` with `values` (0 or above) at `positions` along the last axis. A repeated position must repeat its value."""
    if xp is np:
        rows = rows.copy()  # put_along_axis writes in place
        np.put_along_axis(rows, positions, values, axis=1)
        return rows
    # Not a scatter: a GPU or TPU runs it one element after the other.
    here = positions[:, :, None] == xp.arange(rows.shape[1])
    found = xp.where(here, values[:, :, None], -1).max(axis=1)
    return xp.where(found >= 0, found, rows)


def _choose_positions(
    can_mask: np.ndarray, rng: np.random.Generator, ratio: float, num_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """The chosen positions `[batch, P]` (ascending; unused ones last and 0), and whether each is used (bool)."""
    length = can_mask.shape[1]
    scores = np.where(can_mask, rng.random(can_mask.shape), 2.0)  # 2 sorts after every maskable token
    candidates = np.argsort(scores, axis=1)[:, :num_positions]
    num_maskable = can_mask.sum(axis=1)
    num_chosen = np.minimum(np.maximum(1, np.rint(ratio * num_maskable)), np.minimum(num_maskable, num_positions))
    chosen = np.arange(num_positions) < num_chosen[:, None]
    positions = np.sort(np.where(chosen, candidates, length), axis=1)  # `length` sorts unused ones last
    used = positions < length
    return np.where(used, positions, 0), used


@dataclass(frozen=True, eq=False)
class MaskedLMData:
    """Blocks and their masks. Every method is a pure function of the fields and its arguments.

    `blocks` are `[rows, length]` int32. The other fields are those of `choose_masks`. All batches have the same shapes: an
    incomplete last batch is padded with copies of row 0 whose weights are 0.
    """

    blocks: np.ndarray
    batch_size: int
    ratio: float
    mask_token_id: int
    pad_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    seed: int

    @property
    def can_mask(self) -> np.ndarray:
        """`[rows, length]` bool, True if a token may be masked (`maskable`)."""
        return _maskable(self.blocks, self.special_ids)

    @property
    def num_positions(self) -> int:
        """P, the static number of masked positions per row."""
        return num_masked(self.blocks.shape[1], self.ratio)

    @property
    def batches_per_epoch(self) -> int:
        """Batches per epoch. The last one may be padded."""
        return num_batches(len(self.blocks), self.batch_size)

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The only (batch, length) pair of training and evaluation, so each of them is one compiled program."""
        return {(self.batch_size, self.blocks.shape[1])}

    def train_batch(self, micro_step: int) -> Batch:
        """The batch of a micro-step, counted from 0 over all epochs.

        Rows are permuted anew in each epoch, and masks are drawn anew in each micro-step. Shapes are as in `mask_rows`.
        """
        return self.assemble(self.device_data, self.draw(micro_step), np)

    @property
    def device_data(self) -> Batch:
        """Arrays shared by all batches, from which `assemble` gathers: `blocks`, `[rows, length]` int32."""
        return {"blocks": self.blocks}

    def draw(self, micro_step: int) -> Batch:
        """Indices of the batch of a micro-step: its `rows`, `[batch]` int32, and their masks (`choose_masks`)."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        rows = epoch_order(len(self.blocks), self.batch_size, self.seed, epoch)[index]
        real = np.maximum(rows, 0)  # FILL reads row 0, whose weights become 0 below
        masks = self._masks(real, np.random.default_rng([self.seed, MASK_STREAM, micro_step]))
        weights = np.where((rows == FILL)[:, None], np.float32(0), masks["weights"])
        return {**masks, "rows": real.astype(np.int32), "weights": weights}

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a `draw`, in arrays of the namespace `xp`: numpy, or jax.numpy inside a compiled program."""
        return _masked_batch(device_data["blocks"][draw["rows"]], draw, self.pad_token_id, xp)

    def eval_batches(self) -> Iterator[Batch]:
        """Every row once, in order. The masks depend only on the blocks, not on the seed or the batch size."""
        masks_of = lru_cache(maxsize=2)(self._evaluation_masks)  # a batch may begin in one group and end in the next
        for rows in cut(np.arange(len(self.blocks)), self.batch_size):
            real = np.maximum(rows, 0)
            starts = real // _ROWS_PER_DRAW * _ROWS_PER_DRAW
            masks = {name: np.empty((len(rows), *value.shape[1:]), value.dtype) for name, value in masks_of(0).items()}
            for start in np.unique(starts):
                here = starts == start
                for name, values in masks_of(int(start)).items():
                    masks[name][here] = values[real[here] - start]
            batch = _masked_batch(self.blocks[real], masks, self.pad_token_id, np)
            batch["weights"][rows == FILL] = 0
            yield batch

    def _evaluation_masks(self, start: int) -> Batch:
        # Drawn for groups of fixed size, or the masks would depend on the batch size.
        rows = np.arange(start, min(start + _ROWS_PER_DRAW, len(self.blocks)))
        return self._masks(rows, np.random.default_rng([EVALUATION_SEED, start]))

    def with_seed(self, seed: int) -> MaskedLMData:
        """The same rows, in the order and with the masks of another seed."""
        return replace(self, seed=seed)

    def head(self, num_rows: int) -> MaskedLMData:
        """Only the first `num_rows` rows."""
        return replace(self, blocks=self.blocks[:num_rows])

    def single_mask_batches(self) -> Iterator[Batch]:
        """Each maskable token masked in a copy of its row (P = 1), for pseudo-perplexity (Salazar et al. 2020, eq. 1).

        A row is repeated for each of its maskable tokens, so this is about `length` times the work of `eval_batches`.
        """
        where = np.argwhere(self.can_mask)
        for chosen in cut(np.arange(len(where)), self.batch_size):
            rows, positions = where[np.maximum(chosen, 0)].T
            originals = self.blocks[rows]
            input_ids = originals.astype(np.int32)
            input_ids[np.arange(len(rows)), positions] = self.mask_token_id
            yield {
                "input_ids": input_ids,
                "attention_mask": (originals != self.pad_token_id).astype(np.int32),
                "positions": positions[:, None].astype(np.int32),
                "labels": originals[np.arange(len(rows)), positions][:, None].astype(np.int32),
                "weights": (chosen != FILL)[:, None].astype(np.float32),
            }

    def _masks(self, rows: np.ndarray, rng: np.random.Generator) -> Batch:
        blocks = self.blocks[rows]
        return choose_masks(
            blocks,
            _maskable(blocks, self.special_ids),
            rng=rng,
            ratio=self.ratio,
            num_positions=self.num_positions,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
        )


def masked_lm_data(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    length: int,
    batch_size: int,
    ratio: float,
    seed: int,
    cache: TokenCache | None = None,
) -> MaskedLMData:
    """Encode texts as `MaskedLMData`. Arguments are as in `make_blocks` and `mask_rows`; `seed` is the run's (0 or above).

    Raises InputError if the ratio is outside (0, 1] or the batch size below 1, and as `make_blocks`.
    """
    if not 0 < ratio <= 1:
        raise InputError(
            f"mask ratio {ratio} is not a share of the tokens; give one above 0 and at most 1, such as 0.15"
        )
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is too small; give at least 1")
    blocks = make_blocks(texts, tokenizer, length=length, cache=cache)
    return MaskedLMData(
        blocks=blocks,
        batch_size=batch_size,
        ratio=ratio,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        seed=seed,
    )
