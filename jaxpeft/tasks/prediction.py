"""Answers of an adapted model to a user's own texts: filled masks, or classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.models.inputs import max_tokens
from jaxpeft.training.objective import Objective
from jaxpeft.trees import Adapters, Layers, Params

Answers = list[tuple[str, float]]
"""Tokens or labels with their probability, likeliest first."""


def fill_masks(
    objective: Objective,
    frozen: Params,
    adapters: Adapters,
    masks: Layers,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    top: int = 5,
) -> list[list[Answers]]:
    """For every text and every `[MASK]` in it (or the tokenizer's own mask token), the `top` likeliest tokens.

    Raises:
        InputError: as `find_masks`.
    """
    encoded, is_mask = find_masks(objective, tokenizer, texts)
    positions = np.zeros((len(texts), is_mask.sum(1).max()), np.int32)
    for i, row in enumerate(is_mask):
        positions[i, : row.sum()] = np.flatnonzero(row)
    logits = _logits(objective, frozen, adapters, masks, {**encoded, "positions": positions})
    return [
        [_top(logits[i, j], tokenizer.convert_ids_to_tokens, top) for j in range(row.sum())]
        for i, row in enumerate(is_mask)
    ]


def find_masks(objective: Objective, tokenizer: Any, texts: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """`texts` as a batch, and where in it their masks are: bool `[texts, length]`.

    Raises:
        InputError: for a text without a mask, or longer than the model's positions.
    """
    texts = [text.replace("[MASK]", tokenizer.mask_token) for text in texts]
    encoded = _encode(objective, tokenizer, texts)
    is_mask = encoded["input_ids"] == tokenizer.mask_token_id
    for text, row in zip(texts, is_mask, strict=True):
        if not row.any():
            raise InputError(f"'{text}' has no {tokenizer.mask_token} to fill")
    return encoded, is_mask


def classify(
    objective: Objective,
    frozen: Params,
    adapters: Adapters,
    masks: Layers,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    label_names: Sequence[str] | None,
    top: int = 5,
) -> list[Answers]:
    """For every text the `top` likeliest labels; for regression the value, as one answer named "value"."""
    logits = _logits(objective, frozen, adapters, masks, _encode(objective, tokenizer, texts))
    if logits.shape[-1] == 1:
        return [[("value", float(row[0]))] for row in logits]
    names = label_names or [str(i) for i in range(logits.shape[-1])]
    return [_top(row, lambda ids: [names[i] for i in ids], top) for row in logits]


def _encode(objective: Objective, tokenizer: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    encoded = tokenizer(list(texts), padding=True, pad_to_multiple_of=16, return_tensors="np")
    limit = max_tokens(objective.model.config) - objective.virtual_tokens
    lengths = encoded["attention_mask"].sum(1)
    if lengths.max() > limit:
        text = texts[int(lengths.argmax())]
        besides = " besides the prompt's" if objective.virtual_tokens else ""
        raise InputError(
            f"'{text[:40]}…' has {lengths.max()} tokens; the model has {limit} positions{besides}: shorten it"
        )
    return {key: value[:, :limit].astype(np.int32) for key, value in encoded.items()}


def _logits(
    objective: Objective, frozen: Params, adapters: Adapters, masks: Layers, batch: dict[str, np.ndarray]
) -> np.ndarray:
    return np.asarray(jax.jit(objective.logits)(frozen, adapters, masks, batch))


def _top(logits: np.ndarray, names: Any, top: int) -> Answers:
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    return list(zip(names(best.tolist()), probabilities[best].tolist(), strict=True))
