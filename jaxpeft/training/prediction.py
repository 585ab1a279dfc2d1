"""Answers of an adapted model to a user's own texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxpeft.models.inputs import max_tokens
from jaxpeft.training.objective import Objective
from jaxpeft.trees import Adapters, Layers, Params


def predict(
    objective: Objective,
    frozen: Params,
    adapters: Adapters,
    masks: Layers,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    label_names: Sequence[str] | None = None,
    top: int = 5,
) -> list[Any]:
    """The task's answer to every text (`Task.answer`): tokens for each mask, labels, or a number.

    Raises:
        InputError: the task cannot answer one of the texts, or the model has too few positions for it.
    """
    batch = encode(objective, tokenizer, texts)
    arrays = {key: value for key, value in batch.items() if key != "num_masks"}
    logits = np.asarray(jax.jit(objective.logits)(frozen, adapters, masks, arrays))
    return objective.task.answer(logits, batch, tokenizer, label_names, top)


def encode(objective: Objective, tokenizer: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    """`texts` as one batch of the objective's task (`Task.encode`).

    Raises:
        InputError: as `predict`.
    """
    virtual = objective.virtual_tokens
    room = max_tokens(objective.model.config) - virtual
    return objective.task.encode(texts, tokenizer, num_positions=room, virtual_tokens=virtual)
