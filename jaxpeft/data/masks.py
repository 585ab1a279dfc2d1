"""Masks: which tokens of a row are masked, and what takes their place (Devlin et al. 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpeft.data.whole_words import choose_words

Batch = dict[str, np.ndarray]


def maskable(blocks: np.ndarray, tokenizer: Any) -> np.ndarray:
    """`[rows, length]` bool, True if a token may be masked, which excludes special tokens and the unknown token.

    The unknown token stands for thousands of words. It is easy to predict and would make the perplexity too good.
    """
    return not_special(blocks, tokenizer.all_special_ids)


def not_special(blocks: np.ndarray, special_ids: Sequence[int]) -> np.ndarray:
    """`[rows, length]` bool, True for a token that is none of the `special_ids`."""
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
    return masked_batch(rows, choose_masks(rows, can_mask, **options), pad_token_id, np)


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
    word_starts: np.ndarray | None = None,
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
      word_starts: `[vocabulary]` bool, True if a token begins a word: whole words are masked (`choose_words`). None: single tokens.

    Returns:
      `positions` and `weights` as in `mask_rows`, and `replacements`: `[batch, P]` int32, the new ids there.
    """
    if word_starts is None:
        positions, used = _choose_positions(can_mask, rng, ratio, num_positions)
    else:
        positions, used = choose_words(word_starts[rows], can_mask, rng, ratio, num_positions)
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


def masked_batch(rows: Any, masks: Batch, pad_token_id: int, xp: Any) -> dict[str, Any]:
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
