"""Products of tokens and matrices in a form whose gradients need no transposed copies."""

from __future__ import annotations

from collections.abc import Callable

import jax


def flat(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """`call` on the rows of `x: [..., d]` as one matrix, `[n, d]`; the result has x's leading axes again.

    The values are the same. XLA computes the gradient of a matrix that is multiplied by several leading axes from a transposed copy
    of x; from one matrix it does not (measured for the CPU in benchmarks/README.md).
    """
    if x.ndim <= 2:
        return call(x)
    y = call(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """`x: [..., n]` times `matrix: [n, k]`, as `flat` computes it."""
    return flat(lambda rows: rows @ matrix, x)
