"""The arguments of a Flax module of transformers besides token ids and attention mask, and the longest row it can read."""

from __future__ import annotations

import inspect
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapters.base import PLACEHOLDER
from jaxpeft.errors import InputError
from jaxpeft.families import family_of


def max_tokens(config: Any) -> int:
    """Return the longest sequence for which the model has positions, in tokens."""
    # These positions are up to the padding index, and no token gets them.
    unused = config.pad_token_id + 1 if family_of(config.model_type).positions_after_padding else 0
    return config.max_position_embeddings - unused


def module_inputs(module: nn.Module, config: Any, batch: dict[str, Any], virtual_tokens: int = 0) -> dict[str, Any]:
    """Return all arguments of `module` for a batch, with room for `virtual_tokens` before every row.

    Virtual tokens are attended to and have type 0. With them, RoBERTa's positions count padding too: transformers counts so if it
    is given embeddings instead of ids. `position_ids` of the batch, from 0 in every text, replace counted ones.

    Raises:
        InputError: if the module needs an argument that an encoder does not have, such as a decoder's ids.
    """
    ids, mask = batch["input_ids"], batch["attention_mask"]
    types = batch.get("token_type_ids", jnp.zeros_like(ids))
    if virtual_tokens:
        ids, mask, types = (
            jnp.pad(array, ((0, 0), (virtual_tokens, 0)), constant_values=value)
            for array, value in ((ids, PLACEHOLDER), (mask, 1), (types, 0))
        )
    positions = batch.get("position_ids", jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape))
    if family_of(config.model_type).positions_after_padding:
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
    for name, parameter in wanted.items():
        if name != "self" and name not in available and parameter.default is inspect.Parameter.empty:
            raise InputError(f"a model of type '{config.model_type}' needs {name}: only encoders can be used")
    return {key: value for key, value in available.items() if key in wanted}
