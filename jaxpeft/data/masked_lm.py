"""Masked language modelling: text to blocks of one length, and masks that are a pure function of (seed, step).

The masks are BERT's (Devlin et al. 2018, section 3.1): a share of the tokens is chosen, of which 80 % become [MASK],
10 % a random token and 10 % stay. Unlike BERT's, they are drawn anew for every epoch (RoBERTa's dynamic masking), and
the number of places is the same for every row, so that the model computes logits at those places only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxpeft.data.order import FILL, MASK_STREAM, cut, epoch_order, num_batches
from jaxpeft.errors import InputError

Batch = dict[str, np.ndarray]

WIKITEXT_UNKNOWN = "<unk>"
EVALUATION_SEED = 20181011  # constant: two runs of different seeds are judged on the same masks
_TEXTS_PER_CALL = 1024
_ROWS_PER_DRAW = 1024  # evaluation masks are drawn for so many rows at a time, whatever the batch size


def make_blocks(texts: Sequence[str], tokenizer: Any, *, length: int) -> np.ndarray:
    """The texts, joined and cut into rows of [CLS] + `length - 2` tokens + [SEP].

    WikiText's literal `<unk>` becomes the tokenizer's unknown token. The incomplete last piece is padded if it fills a
    quarter of the length (or if it is all there is) and is dropped otherwise.

    Args:
      texts: any number of texts; blank ones vanish.
      tokenizer: a transformers tokenizer with [CLS], [SEP], [PAD] and [MASK].
      length: tokens a row, special ones included; the model's own limit is not known here.

    Returns:
      `[rows, length]` int32.

    Raises:
      InputError: no tokens, a length below 3, or a tokenizer without one of the special tokens.
    """
    if length < 3:
        raise InputError(f"length {length} leaves no room for a token between [CLS] and [SEP]; give at least 3")
    _require_special_tokens(tokenizer)
    tokens = _token_stream(texts, tokenizer)
    if not len(tokens):
        raise InputError(f"the {len(texts)} texts hold no tokens; give text that is not blank")
    body = length - 2
    num_full, num_left = divmod(len(tokens), body)
    keep_last = num_left > 0 and (num_full == 0 or 4 * (num_left + 2) >= length)
    blocks = np.full((num_full + keep_last, length), tokenizer.pad_token_id, np.int32)
    blocks[:, 0] = tokenizer.cls_token_id
    blocks[:num_full, 1:-1] = tokens[: num_full * body].reshape(num_full, body)
    blocks[:num_full, -1] = tokenizer.sep_token_id
    if keep_last:
        blocks[-1, 1 : num_left + 1] = tokens[num_full * body :]
        blocks[-1, num_left + 1] = tokenizer.sep_token_id
    return blocks


def _require_special_tokens(tokenizer: Any) -> None:
    for role in ("cls_token", "sep_token", "pad_token", "mask_token"):
        if getattr(tokenizer, f"{role}_id") is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no {role}; masked language modelling needs a BERT-like one"
            )


def _token_stream(texts: Sequence[str], tokenizer: Any) -> np.ndarray:
    """All tokens of all texts, `[n]` int32, without special tokens."""
    unknown = tokenizer.unk_token or WIKITEXT_UNKNOWN
    pieces = [np.zeros(0, np.int32)]
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        chunk = [text.replace(WIKITEXT_UNKNOWN, unknown) for text in texts[start : start + _TEXTS_PER_CALL]]
        # verbose=False: else transformers warns that a text is longer than the model's limit; it is cut into blocks.
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)
        pieces.extend(np.asarray(ids, np.int32) for ids in encoded["input_ids"])
    return np.concatenate(pieces)


def maskable(blocks: np.ndarray, tokenizer: Any) -> np.ndarray:
    """`[rows, length]` bool, True where a token may be masked: not a special token, and not the unknown one.

    The unknown token stands for thousands of words: predicting it is easy, and would flatter the perplexity.
    """
    return ~np.isin(blocks, tokenizer.all_special_ids)


def num_masked(length: int, ratio: float) -> int:
    """The places a row has for masked tokens: `ratio` of those between [CLS] and [SEP], at least one."""
    return max(1, round(ratio * (length - 2)))


def mask_rows(rows: np.ndarray, can_mask: np.ndarray, *, pad_token_id: int, **options: Any) -> Batch:
    """Mask `round(ratio * maskable tokens)` tokens of each row: at least one where any can be, at most `num_positions`.

    Args:
      rows: `[batch, length]` int token ids.
      can_mask: `[batch, length]` bool, True where a token may be chosen.
      pad_token_id: the id of [PAD], which is not attended to.
      **options: the others of `choose_masks`.

    Returns:
      `input_ids`, `attention_mask`: `[batch, length]` int32. `positions`: `[batch, P]` int32, ascending, unused ones
      last and 0. `labels`: `[batch, P]` int32, the original ids. `weights`: `[batch, P]` float32, 1 or (unused) 0.
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
    """What is masked in each row, and by what.

    Args:
      rows: `[batch, length]` int token ids.
      can_mask: `[batch, length]` bool, True where a token may be chosen.
      rng: decides the choice; the same state gives the same masks.
      ratio: the share of maskable tokens to choose, in (0, 1].
      num_positions: P, the static number of places a row (`num_masked`).
      mask_token_id: the id of [MASK].
      vocab_size: random tokens are drawn from 0 to `vocab_size - 1`,
      special_ids: without these.

    Returns:
      `positions` and `weights` as in `mask_rows`, and `replacements`: `[batch, P]` int32, the id that stands there now.
    """
    positions, used = _choose_positions(can_mask, rng, ratio, num_positions)
    originals = np.take_along_axis(rows, positions, axis=1)
    kind = rng.random(originals.shape)
    # Ids without the special ones, so that a random token is never [MASK] or [SEP].
    words = np.delete(np.arange(vocab_size), [special for special in special_ids if special < vocab_size])
    random_ids = words[rng.integers(len(words), size=originals.shape)]
    chosen = np.select([kind < 0.8, kind < 0.9], [np.full_like(originals, mask_token_id), random_ids], originals)
    # An unused place points at token 0, and must leave it what it is: the first of the row, masked or not.
    first = np.where(used[:, :1] & (positions[:, :1] == 0), chosen[:, :1], rows[:, :1])
    return {
        "positions": positions.astype(np.int32),
        "replacements": np.where(used, chosen, first).astype(np.int32),
        "weights": used.astype(np.float32),
    }


def _masked_batch(rows: Any, masks: Batch, pad_token_id: int, xp: Any) -> dict[str, Any]:
    """The batch of token ids `rows` with `masks`; `xp` is the namespace of the arrays, numpy's or one that writes as numpy does."""
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
    """`rows` with `values`, at least 0, at `positions` along the last axis; where a position is named twice, with the same value."""
    if xp is np:
        rows = rows.copy()
        np.put_along_axis(rows, positions, values, axis=1)
        return rows
    # Not a scatter, which a GPU or TPU does one element after the other.
    here = positions[:, :, None] == xp.arange(rows.shape[1])
    found = xp.where(here, values[:, :, None], -1).max(axis=1)
    return xp.where(found >= 0, found, rows)


def _choose_positions(
    can_mask: np.ndarray, rng: np.random.Generator, ratio: float, num_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """The chosen positions `[batch, P]`, ascending with unused ones last and 0, and which of them are used (bool)."""
    length = can_mask.shape[1]
    scores = np.where(can_mask, rng.random(can_mask.shape), 2.0)  # 2: after every maskable token
    candidates = np.argsort(scores, axis=1)[:, :num_positions]
    num_maskable = can_mask.sum(axis=1)
    num_chosen = np.minimum(np.maximum(1, np.rint(ratio * num_maskable)), np.minimum(num_maskable, num_positions))
    chosen = np.arange(num_positions) < num_chosen[:, None]
    positions = np.sort(np.where(chosen, candidates, length), axis=1)
    used = positions < length
    return np.where(used, positions, 0), used


@dataclass(frozen=True, eq=False)
class MaskedLMData:
    """Blocks and how to mask them; every method is a pure function of these fields and its arguments.

    `blocks` and `can_mask` are `[rows, length]`; the other fields are those of `mask_rows`. All batches have the same
    shapes: a last, incomplete one is filled up with copies of row 0 whose weights are 0.
    """

    blocks: np.ndarray
    can_mask: np.ndarray
    batch_size: int
    ratio: float
    mask_token_id: int
    pad_token_id: int
    vocab_size: int
    special_ids: tuple[int, ...]
    seed: int

    @property
    def num_positions(self) -> int:
        """P, the static number of masked places a row."""
        return num_masked(self.blocks.shape[1], self.ratio)

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch, the last one perhaps filled up."""
        return num_batches(len(self.blocks), self.batch_size)

    @property
    def batch_shapes(self) -> set[tuple[int, int]]:
        """The (batch, length) pairs of training and evaluation: one, so one compiled program each."""
        return {(self.batch_size, self.blocks.shape[1])}

    def train_batch(self, step: int) -> Batch:
        """The batch of a step (counted from 0 over all epochs): rows permuted anew each epoch, masks each step."""
        return self.assemble(self.device_data, self.draw(step), np)

    @property
    def device_data(self) -> Batch:
        """What all batches are made of, besides what `draw` says: `blocks`, `[rows, length]` int32."""
        return {"blocks": self.blocks}

    def draw(self, step: int) -> Batch:
        """What is chance in the batch of a step: its `rows`, `[batch]` int32, and their masks (`choose_masks`)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = epoch_order(len(self.blocks), self.batch_size, self.seed, epoch)[index]
        real = np.maximum(rows, 0)
        masks = self._masks(real, np.random.default_rng([self.seed, MASK_STREAM, step]))
        weights = np.where((rows == FILL)[:, None], np.float32(0), masks["weights"])
        return {**masks, "rows": real.astype(np.int32), "weights": weights}

    def assemble(self, device_data: Any, draw: Any, xp: Any) -> dict[str, Any]:
        """The batch of a `draw`, in arrays of the namespace `xp`: numpy, or jax's inside a compiled program."""
        return _masked_batch(device_data["blocks"][draw["rows"]], draw, self.pad_token_id, xp)

    def eval_batches(self) -> Iterator[Batch]:
        """Every row once, in order, with masks that depend on the blocks alone: not on the seed or the batch size."""
        starts = range(0, len(self.blocks), _ROWS_PER_DRAW)
        masks = [
            self._masks(np.arange(start, min(start + _ROWS_PER_DRAW, len(self.blocks))), _evaluation_rng(start))
            for start in starts
        ]
        joined = {name: np.concatenate([part[name] for part in masks]) for name in masks[0]}
        everything = _masked_batch(self.blocks, joined, self.pad_token_id, np)
        for rows in cut(np.arange(len(self.blocks)), self.batch_size):
            batch = {name: values[np.maximum(rows, 0)] for name, values in everything.items()}
            batch["weights"][rows == FILL] = 0
            yield batch

    def with_seed(self, seed: int) -> MaskedLMData:
        """The same rows, in the order and with the masks of another seed."""
        return replace(self, seed=seed)

    def head(self, num_rows: int) -> MaskedLMData:
        """The same with the first `num_rows` rows only."""
        return replace(self, blocks=self.blocks[:num_rows], can_mask=self.can_mask[:num_rows])

    def single_mask_batches(self) -> Iterator[Batch]:
        """Every maskable token of every row masked alone (P = 1), for pseudo-perplexity (Salazar et al. 2020, eq. 1).

        One copy of a row for each of its maskable tokens: about `length` times the work of `eval_batches`.
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
        return choose_masks(
            self.blocks[rows],
            self.can_mask[rows],
            rng=rng,
            ratio=self.ratio,
            num_positions=self.num_positions,
            mask_token_id=self.mask_token_id,
            vocab_size=self.vocab_size,
            special_ids=self.special_ids,
        )


def _evaluation_rng(start: int) -> np.random.Generator:
    return np.random.default_rng([EVALUATION_SEED, start])


def masked_lm_data(
    texts: Sequence[str], tokenizer: Any, *, length: int, batch_size: int, ratio: float, seed: int
) -> MaskedLMData:
    """Texts to `MaskedLMData`; arguments as in `make_blocks` and `mask_rows`, `seed` is the run's (0 or above).

    Raises InputError on a ratio outside (0, 1], a batch size below 1, and what `make_blocks` refuses.
    """
    if not 0 < ratio <= 1:
        raise InputError(
            f"mask ratio {ratio} is not a share of the tokens; give one above 0 and at most 1, such as 0.15"
        )
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} holds no row; give at least 1")
    blocks = make_blocks(texts, tokenizer, length=length)
    return MaskedLMData(
        blocks=blocks,
        can_mask=maskable(blocks, tokenizer),
        batch_size=batch_size,
        ratio=ratio,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        special_ids=tuple(tokenizer.all_special_ids),
        seed=seed,
    )
