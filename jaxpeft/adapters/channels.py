"""A layer at some of its channels: the columns of its kernel that are computed, and the rows that are read.

A layer computed at the outputs `outputs` gives exactly those columns of its result. A layer with the inputs `inputs` takes x at
these channels only, and gives the same result as for an x that is zero elsewhere. Indices may be traced: the number of channels
decides the shapes, so one compiled program serves any choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import FrozenLayer, SiteMethod, SiteParams, at_indices
from jaxpeft.adapters.products import product


@dataclass(frozen=True)
class Channels:
    """The channels of a linear layer that are computed.

    Attributes:
        inputs: int32 `[k]`, without repetition: the inputs of which x has the values, `x: [..., k]`. None: all.
        outputs: int32 `[k]`, without repetition: the outputs that are computed, `y: [..., k]`. None: all.
    """

    inputs: jax.Array | None = None
    outputs: jax.Array | None = None

    @property
    def are_all(self) -> bool:
        """True if nothing is left out."""
        return self.inputs is None and self.outputs is None


jax.tree_util.register_dataclass(Channels, ["inputs", "outputs"], [])


def forward(
    method: SiteMethod | None,
    x: jax.Array,
    params: SiteParams,
    layer: FrozenLayer,
    rng: jax.Array | None,
    channels: Channels,
) -> jax.Array:
    """The layer on x at the `channels`, with the adapter `params` of `method`, if it has one.

    A method that says how its parameters belong to channels (`SiteMethod.at_channels`) computes only these. For another method the
    update is computed at full width, and only the product with the frozen kernel is smaller.
    """
    if method is None:
        return _sliced(layer, channels).base(x)
    own = method.at_channels(params, inputs=channels.inputs, outputs=channels.outputs)
    if own is not None:
        return method.forward(x, own, _sliced(layer, channels), rng)
    d_in, d_out = jax.eval_shape(lambda: layer.weights(layer.dtype)).shape
    wide = x if channels.inputs is None else spread(x, channels.inputs, d_in)

    def base(x: jax.Array) -> jax.Array:
        y = _sliced(layer, channels).base(x if channels.inputs is None else take(x, channels.inputs))
        return y if channels.outputs is None else spread(y, channels.outputs, d_out)

    y = method.forward(wide, params, replace(layer, base=base), rng)
    return y if channels.outputs is None else take(y, channels.outputs)


def _sliced(layer: FrozenLayer, channels: Channels) -> FrozenLayer:
    """The frozen layer at the `channels`. Its kernel is a copy of the rows and columns, small beside the activations."""

    def weights(dtype: Any) -> jax.Array:
        kernel = layer.weights(dtype)
        kernel = kernel if channels.inputs is None else at_indices(kernel, channels.inputs, 0)
        return kernel if channels.outputs is None else at_indices(kernel, channels.outputs, 1)

    bias = layer.bias
    if bias is not None and channels.outputs is not None:
        bias = at_indices(bias, channels.outputs, 0)
    sliced = replace(layer, weights=weights, bias=bias)

    def base(x: jax.Array) -> jax.Array:
        return sliced.plus_bias(product(x.astype(layer.dtype), sliced.kernel()))

    return replace(sliced, base=base)


# Both directions are gathers. The transpose of a gather would be a scatter, which XLA runs on one core of a CPU, entry by entry.


@jax.custom_vjp
def take(x: jax.Array, channels: jax.Array) -> jax.Array:
    """`x: [..., d]` at the `channels: [k]`: `[..., k]`."""
    return at_indices(x, channels, x.ndim - 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def spread(x: jax.Array, channels: jax.Array, width: int) -> jax.Array:
    """`x: [..., k]` at the `channels: [k]` of `[..., width]`, and zeros elsewhere."""
    place = jnp.full(width, x.shape[-1], jnp.int32).at[channels].set(jnp.arange(x.shape[-1], dtype=jnp.int32))
    return jnp.take(x, place, axis=-1, mode="fill", fill_value=0)


def _take_forward(x: jax.Array, channels: jax.Array) -> tuple[jax.Array, tuple]:
    return take(x, channels), (channels, jnp.zeros((x.shape[-1], 0)))


def _take_backward(residuals: tuple, gradient: jax.Array) -> tuple:
    channels, width = residuals
    return spread(gradient, channels, width.shape[0]), None


def _spread_forward(x: jax.Array, channels: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    return spread(x, channels, width), channels


def _spread_backward(width: int, channels: jax.Array, gradient: jax.Array) -> tuple:
    return take(gradient, channels), None


take.defvjp(_take_forward, _take_backward)
spread.defvjp(_spread_forward, _spread_backward)
