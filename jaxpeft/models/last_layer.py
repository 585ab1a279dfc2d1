"""The last layer, computed for the tokens alone that the head reads: masked ones, or a classifier's first.

Keys and values are of all tokens, for these are what the others attend to; a query that nobody reads, and all that follows from
it, is left out. It changes no result but in rounding, and spares most of one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxpeft.models.build import Model

Take = Callable[[jax.Array], jax.Array]
"""`[rows, length, d]` → `[rows, tokens, d]`."""


def last_layer(model: Model, take: Take) -> dict[str, Callable[..., Any]]:
    """What to call instead of a module of `model`'s last layer, by path; {} where its architecture is not known."""
    found = _MODULES.get(model.model_type)
    if found is None:
        return {}
    path, call = found
    return {f"{model.base_prefix}/{path.format(last=model.config.num_hidden_layers - 1)}": partial(call, take=take)}


def _bert_attention(
    module: Any, x: jax.Array, mask: jax.Array, *, take: Take, layer_head_mask: Any, deterministic: bool, **_: Any
) -> tuple[jax.Array]:
    """BERT's attention with its output: as its module does, but with queries of their own, as a decoder has for an encoder."""
    taken = take(x)
    options = {"layer_head_mask": layer_head_mask, "key_value_states": x, "deterministic": deterministic}
    attended = module.self(taken, mask, **options)[0]
    return (module.output(attended, taken, deterministic=deterministic),)


def _distilbert_layer(
    module: Any, *, take: Take, hidden_states: jax.Array, attn_mask: jax.Array, deterministic: bool, **_: Any
) -> tuple[jax.Array]:
    """DistilBERT's layer: its sums stand in the layer, not in modules."""
    taken = take(hidden_states)
    inputs = {"query": taken, "key": hidden_states, "value": hidden_states, "mask": attn_mask}
    attended = module.sa_layer_norm(module.attention(**inputs, deterministic=deterministic)[0] + taken)
    return (module.output_layer_norm(module.ffn(attended, deterministic=deterministic) + attended),)


# RoBERTa-PreLayerNorm normalises inside its attention, before the keys: there `Model.behind_attention` must do.
_MODULES: dict[str, tuple[str, Callable[..., Any]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), ("encoder/layer/{last}/attention", _bert_attention)),
    "distilbert": ("transformer/layer/{last}", _distilbert_layer),
}
