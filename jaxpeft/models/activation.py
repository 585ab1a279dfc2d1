"""GELU by `erf`, instead of the `erfc` of jax's own, which takes XLA longer on a CPU. It is torch's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.models.build import Model
from jaxpeft.trees import below


def gelu(x: jax.Array) -> jax.Array:
    """x·Φ(x), where Φ is the normal distribution function (Hendrycks and Gimpel 2016, arXiv 1606.08415).

    It is computed in at least fp32: 1 + erf is small for negative x, and bf16 would round it to 0.
    """
    wide = x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def activation_overrides(model: Model) -> dict[str, Callable[..., Any]]:
    """Return path → the function to call instead of the module that applies the activation there.

    {} if the activation is not the exact GELU, or the family has no such module. It costs only time.
    """
    found = model.family.feed_forward
    if found is None or getattr(model.config, found.activation) != "gelu":
        return {}

    def call(module: Any, *args: Any, **kwargs: Any) -> jax.Array:
        return found.call(module, gelu, *args, **kwargs)

    layers = range(model.config.num_hidden_layers)
    return {below(model.base_prefix, found.path.format(number=number)): call for number in layers}
