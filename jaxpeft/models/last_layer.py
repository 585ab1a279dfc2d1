"""The last layer, computed only for the tokens that the head reads: the masked ones, or a classifier's first.

Keys and values are computed for all tokens, because the tokens that the head reads attend to all. The other tokens' queries, and
everything computed from them, are left out. Results change only by rounding, and most of one layer's work is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxpeft.models.build import Model
from jaxpeft.trees import below

Take = Callable[[jax.Array], jax.Array]
"""`[rows, length, d]` → `[rows, tokens, d]`."""


def last_layer(model: Model, take: Take) -> dict[str, Callable[..., Any]]:
    """Return path → the function to call instead of that module of `model`'s last layer; {} if its family has none.

    `{}` costs only time: without it the whole layer is computed.
    """
    found = model.family.last_layer
    if found is None:
        return {}
    path = found.path.format(last=model.config.num_hidden_layers - 1)
    return {below(model.base_prefix, path): partial(found.call, take=take)}
