"""Which channels matter for a batch: the norm of each channel over the batch's tokens, estimated.

This file differs from the paper in the estimate. SparseLoRA estimates the activations of a sequence's mean from the low-rank factors
alone. In an encoder that is little better than chance: without a gate, the norm of a channel is not that of its mean, and the
tokens' common mean, which layer norms make large, is not in the leading factors. Here the mean of all tokens passes through the full
kernel, which is one vector's product; the tokens' distances from it pass through the factors; and what the factors leave out
counts by its size. On MiniLM the chosen half then has 78 % of the true one instead of 59 %
(`benchmarks/sparsity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

NUM_SAMPLED = 256
"""Tokens of a batch from which the norms are estimated, about. More change the choice hardly, and cost time."""

# Gauss-Hermite quadrature with three points: the mean of f(y + σz) over z ~ N(0, 1), exact for polynomials up to degree 5.
_POINTS = ((0.0, 2 / 3), (3**0.5, 1 / 6), (-(3**0.5), 1 / 6))

Activation = Callable[[jax.Array], jax.Array]


def sampled(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every n-th token of every row, about `NUM_SAMPLED` in total.

    Args:
        x: `[rows, length, d]`.
        weights: `[rows, length]`, 0 for padding.

    Returns:
        the tokens `[n, d]` in float32, and their weights `[n]`, whose sum is 1.
    """
    rows, length = weights.shape
    step = min(length, max(1, rows * length // NUM_SAMPLED))
    # Not from 0: the first token of every row is [CLS], which is unlike the others.
    chosen = slice(step // 2, None, step)
    some = weights[:, chosen].reshape(-1).astype(jnp.float32)
    return x[:, chosen].reshape(-1, x.shape[-1]).astype(jnp.float32), some / jnp.maximum(some.sum(), 1.0)


def estimated_squares(
    x: jax.Array,
    weights: jax.Array,
    estimator: Mapping[str, jax.Array],
    kernel: jax.Array,
    bias: jax.Array | None,
    activation: Activation | None = None,
) -> jax.Array:
    """The estimated mean square of every output channel, `[d_out]` float32.

    Args:
        x: tokens `[n, d_in]` in float32, from `sampled`.
        weights: `[n]`, with the sum 1.
        estimator: `u`, `v` and `rest` (`estimators.estimate_kernel`).
        kernel: `[d_in, d_out]`.
        bias: `[d_out]` or None.
        activation: applied to the outputs; None: they are taken as they are.
    """
    mean = weights @ x
    distance = x - mean
    variance = (weights @ jnp.square(distance)).mean()
    y = mean @ kernel + (0.0 if bias is None else bias) + (distance @ estimator["u"]) @ estimator["v"]
    missing = variance * estimator["rest"]  # the variance of what the factors leave out, as if x were isotropic
    if activation is None:
        return weights @ jnp.square(y) + missing
    deviation = jnp.sqrt(missing)
    squares = [share * (weights @ jnp.square(activation(y + point * deviation))) for point, share in _POINTS]
    return sum(squares[1:], squares[0])


def true_squares(
    x: jax.Array,
    weights: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    activation: Activation | None = None,
) -> jax.Array:
    """The mean square of every output channel over all tokens, `[d_out]` float32: the oracle, at the cost of the dense layer.

    Args:
        x: `[rows, length, d_in]`.
        weights: `[rows, length]`, 0 for padding.
        kernel: `[d_in, d_out]`.
        bias: `[d_out]` or None.
        activation: as in `estimated_squares`.
    """
    y = x.astype(jnp.float32) @ kernel + (0.0 if bias is None else bias)
    y = y if activation is None else activation(y)
    return (jnp.square(y) * weights[..., None]).sum((0, 1)) / jnp.maximum(weights.sum(), 1)


def highest(scores: jax.Array, num_keep: int) -> jax.Array:
    """The indices of the `num_keep` highest `scores: [d]`, int32 `[num_keep]`."""
    return jax.lax.top_k(scores, num_keep)[1]
