"""Layers on a quantised kernel that hold the full-precision kernel only while they compute, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def recomputed(layer: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `layer`, changed to dequantise its kernel when its input is there, and again when its gradient is there.

    Args:
        layer: `(stored, key, x, *args) → y`. It takes the quantised kernel (or a tree with it, without gradients), a PRNG key or
            None, the input, and further trees that may be None. Gradients flow to `x` and `args`. It must not close over traced
            values.
    """
    # `jax.checkpoint` promises the second dequantisation only, and on a CPU (jax 0.10.2) does not keep that: XLA removes
    # its barriers before it merges equal expressions, and schedules first what waits for nothing. All kernels of the base
    # were then alive at once: 12.8 MB of temporaries for 12.6 MB of kernels. With this there are 2.0 MB.

    @jax.custom_vjp
    def run(stored: Any, key: jax.Array | None, x: jax.Array, *args: Any) -> jax.Array:
        return layer(_after(x, stored), key, x, *args)

    def forward(stored: Any, key: jax.Array | None, *args: Any) -> tuple[jax.Array, tuple]:
        return run(stored, key, *args), (stored, key, args)

    def backward(residuals: tuple, gradient: jax.Array) -> tuple:
        stored, key, args = residuals
        again = _after(gradient, stored)
        _, pull_back = jax.vjp(lambda *args: layer(again, key, *args), *args)
        return None, None, *pull_back(gradient)

    run.defvjp(forward, backward)
    return run


def _after(value: jax.Array, stored: Any) -> Any:
    """`stored`, available to the program only after `value` is."""
    # It is enough to hold back the largest array: the weights. Their dequantisation then waits too.
    leaves, structure = jax.tree.flatten(stored)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = _held_back(value, jnp.asarray(leaves[largest]))
    return jax.tree.unflatten(structure, leaves)


@jax.custom_batching.custom_vmap
def _held_back(value: jax.Array, stored: jax.Array) -> jax.Array:
    def barrier(value: jax.Array, stored: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier((value, stored))[1]

    def arithmetic(value: jax.Array, stored: jax.Array) -> jax.Array:
        # The condition is never true, but XLA cannot see that. Used on CPUs only: the devices that share a batch must agree
        # on this number.
        one = value.reshape(-1)[0]
        never = (one > 0) & (one < 0)
        if jnp.issubdtype(stored.dtype, jnp.integer):
            return stored ^ never.astype(stored.dtype)
        # Of a float, the bits: adding a zero would turn -0 into 0.
        bits = jax.lax.bitcast_convert_type(stored, f"uint{8 * stored.dtype.itemsize}")
        return jax.lax.bitcast_convert_type(bits ^ never.astype(bits.dtype), stored.dtype)

    return jax.lax.platform_dependent(value, stored, cpu=arithmetic, default=barrier)


@_held_back.def_vmap
def _held_back_for_all(
    axis_size: int, in_batched: list[bool], value: jax.Array, stored: jax.Array
) -> tuple[jax.Array, bool]:
    # Runs that train together have a value each but one base. The base waits for the first run's value, and stays single.
    return _held_back(value[0] if in_batched[0] else value, stored), in_batched[1]
