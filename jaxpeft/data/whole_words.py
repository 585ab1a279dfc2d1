"""Whole-word masking: the tokens of a word are masked together (Cui et al. 2019, arXiv 1906.08101; Devlin's later BERT)."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxpeft.errors import InputError

# How the pieces of words are written in the vocabularies of transformers' tokenizers.
_BYTE_LEVEL_SPACE, _SENTENCEPIECE_SPACE = "Ġ", "▁"


def word_starts(tokenizer: Any) -> np.ndarray:
    """`[vocabulary]` bool, True if a token begins a word.

    A WordPiece vocabulary marks the tokens that continue a word (`##ing`). Byte-level BPE and SentencePiece mark those that
    follow a space (`Ġ`, `▁`), so there a word ends at the next space, and holds the punctuation behind it.

    Raises:
      InputError: the vocabulary has neither.
    """
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = np.isin(np.arange(len(tokens)), tokenizer.all_special_ids)
    for begins in (_BYTE_LEVEL_SPACE, _SENTENCEPIECE_SPACE):
        found = np.asarray([str(token).startswith(begins) for token in tokens])
        if found.mean() > 0.1:  # of a WordPiece vocabulary one token at most
            return found | special
    continues = np.asarray([str(token).startswith("##") for token in tokens])
    if not continues.any():
        raise InputError(
            f"data.whole_word_masking: the vocabulary of {type(tokenizer).__name__} does not say which tokens begin a word; set it to false"
        )
    return ~continues


def choose_words(
    begins: np.ndarray, can_mask: np.ndarray, rng: np.random.Generator, ratio: float, num_positions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose whole words at random until `round(ratio * maskable tokens)` tokens are chosen. A word that would exceed this is skipped.

    So a row may have a few tokens less, and never more. If all words of a row are longer than that, its first one drawn is chosen,
    up to `num_positions` tokens.

    Args:
      begins: `[batch, length]` bool, True if a token begins a word.
      can_mask: `[batch, length]` bool, True if a token may be chosen. Others end a word.
      rng: decides the choice.
      ratio: the share of maskable tokens to choose.
      num_positions: P, the static number of masked positions per row.

    Returns:
      the positions, `[batch, P]` int, ascending, unused ones last and 0; and whether each is used, bool.
    """
    rows, length = can_mask.shape
    broken = np.zeros_like(can_mask)
    broken[:, 0], broken[:, 1:] = True, ~can_mask[:, :-1]
    word = np.cumsum(begins | broken | ~can_mask, axis=1) - 1  # the number of each token's word, from 0
    offset = np.arange(rows)[:, None] * length
    sizes = np.bincount((offset + word)[can_mask], minlength=rows * length).reshape(rows, length)
    order = np.argsort(np.where(sizes > 0, rng.random((rows, length)), 2.0), axis=1)  # 2 sorts after every word
    in_order = np.take_along_axis(sizes, order, axis=1)
    maskable = can_mask.sum(axis=1)
    wanted = np.minimum(np.maximum(1, np.rint(ratio * maskable)), np.minimum(maskable, num_positions)).astype(int)
    taken, chosen = np.zeros(rows, int), np.zeros((rows, length), bool)
    for i in range(int((sizes > 0).sum(axis=1).max(initial=0))):
        fits = (in_order[:, i] > 0) & (taken + in_order[:, i] <= wanted)
        chosen[fits, order[fits, i]] = True
        taken += np.where(fits, in_order[:, i], 0)
    none = (taken == 0) & (maskable > 0)
    chosen[none, order[none, 0]] = True
    picked = np.take_along_axis(chosen, np.maximum(word, 0), axis=1) & can_mask
    picked &= np.cumsum(picked, axis=1) <= num_positions
    positions = np.sort(np.where(picked, np.arange(length), length), axis=1)[:, :num_positions]
    used = positions < length
    return np.where(used, positions, 0), used
