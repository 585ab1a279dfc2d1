"""What a Flax module of transformers takes besides token ids and attention mask, and how long its rows may be."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapters.base import PLACEHOLDER


def max_tokens(config: Any) -> int:
    """The longest sequence the model has positions for, in tokens."""
    # RoBERTa's positions start behind the padding index.
    offset = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return config.max_position_embeddings - offset


def module_inputs(module: nn.Module, config: Any, batch: dict[str, Any], virtual_tokens: int = 0) -> dict[str, Any]:
    """Fill in what `module` takes besides token ids and attention mask, with room for `virtual_tokens` in front of every row.

    Virtual tokens are attended to and of type 0. With them RoBERTa's positions count padding too, as transformers counts where
    it is given embeddings instead of ids. `position_ids` of the batch, from 0 in every text, stand in for counted ones.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    types = batch.get("token_type_ids", jnp.zeros_like(ids))
    if virtual_tokens:
        ids, mask, types = (
            jnp.pad(array, ((0, 0), (virtual_tokens, 0)), constant_values=value)
            for array, value in ((ids, PLACEHOLDER), (mask, 1), (types, 0))
        )
    positions = batch.get("position_ids", jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape))
    if "roberta" in config.model_type:
        real = (ids != config.pad_token_id).astype(jnp.int32)
        given = virtual_tokens or "position_ids" in batch
        counted = positions + 1 if given else jnp.cumsum(real, axis=-1) * real
        positions = counted + config.pad_token_id
    available = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "position_ids": positions,
        "head_mask": None,
    }
    wanted = inspect.signature(type(module).__call__).parameters
    return {key: value for key, value in available.items() if key in wanted}
