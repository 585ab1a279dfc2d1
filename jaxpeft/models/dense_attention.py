"""Dense attention with a backward pass of its own, laid out for XLA's products on a CPU.

Flax's attention leaves the order of the axes to XLA, which transposes queries, keys, values and all their gradients to suit
its batched products. Here every array has its heads before its tokens from the start, so that each product reads its operands as
they lie. XLA computes a batched product on one core of a CPU (jaxlib 0.10.2, `findings/xla_cpu_batched_product.sh`), so there the heads
are computed in two parts, which can run at the same time. The values are those of Flax, except for rounding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

CPU_PARTS = 2
"""Parts of the heads on a CPU. More were not faster on two cores, and every part adds to the program."""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    kept: jax.Array | None = None,
    *,
    parts: int = 1,
) -> jax.Array:
    """Softmax attention: `[rows, queries, heads, width]`.

    Args:
        query: `[rows, queries, heads, width]`; not yet scaled.
        key: `[rows, keys, heads, width]`.
        value: as `key`.
        visible: bool, broadcastable to `[rows, heads, queries, keys]`, with one head; False leaves a key out.
        kept: what dropout multiplies the attention weights with, broadcastable to the same shape; None: no dropout.
        parts: parts of the heads; 1 if they cannot be divided so.
    """
    kept = jnp.ones((1, 1, 1, 1), query.dtype) if kept is None else kept
    return _attend(1 if query.shape[2] % parts else parts, query, key, value, visible, kept)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    parts: int, query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, kept: jax.Array
) -> jax.Array:
    return _forward(parts, query, key, value, visible, kept)[0]


# Of each part: query, key, value, attention weights, and the factors of dropout, with the heads before the tokens.
_Saved = list[tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]]


def _forward(
    parts: int, query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, kept: jax.Array
) -> tuple[jax.Array, _Saved]:
    heads = query.shape[2]
    outputs, saved = [], []
    for part in range(parts):
        own = slice(part * heads // parts, (part + 1) * heads // parts)
        q, k, v = (x[:, :, own].swapaxes(1, 2) for x in (query * _scale(query), key, value))
        scores = _product(q, k, 3, 3)
        weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(scores.dtype).min))
        mine = kept if kept.shape[1] == 1 else kept[:, own]
        outputs.append(_product(weights * mine, v, 3, 2).swapaxes(1, 2))
        saved.append((q, k, v, weights, mine))
    return jnp.concatenate(outputs, 2), saved


def _backward(parts: int, saved: _Saved, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    found, start = [], 0
    for query, key, value, weights, kept in saved:
        end = start + query.shape[1]
        own, start = gradient[:, :, start:end].swapaxes(1, 2), end
        dropped = weights * kept
        weighted = _product(own, value, 3, 3) * dropped
        scores = weighted - weights * weighted.sum(-1, keepdims=True)
        of_query = _product(scores, key, 3, 2) * _scale(key)
        found.append([of_query, _product(scores, query, 2, 2), _product(dropped, own, 2, 2)])
    query, key, value = (jnp.concatenate([x.swapaxes(1, 2) for x in part], 2) for part in zip(*found, strict=True))
    return query, key, value, None, None


_attend.defvjp(_forward, _backward)


def _scale(x: jax.Array) -> jax.Array:
    return jnp.asarray(x.shape[-1] ** -0.5, x.dtype)


def _product(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product over one axis of each, for every row and head."""
    return jax.lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((0, 1), (0, 1))))
