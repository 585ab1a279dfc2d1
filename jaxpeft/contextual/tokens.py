"""The tokens that the loss reads, which may use every channel: where they are in a batch, and how they are kept apart.

Nothing in an encoder but the position embeddings depends on the order of tokens. So the tokens that the loss reads are moved to the
front of every row (`move_read_tokens`), and a layer is computed in two slices. Rows that hold several texts cannot be
reordered so; their tokens are taken out, computed a second time, and put back (`Places`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp


class TokensRead(Protocol):
    """The tokens that the loss reads, for activations `x: [rows, length, d]`."""

    def take(self, x: jax.Array) -> jax.Array:
        """Those tokens: `[shares, n, d]`."""

    def others(self, x: jax.Array) -> jax.Array:
        """The tokens that leave channels out: all others, or if that is simpler all: `[rows, m, d]`."""

    def join(self, others: jax.Array, read: jax.Array) -> jax.Array:
        """Undo the two: `[rows, length, d]`."""


@dataclass(frozen=True)
class Leading:
    """The first `number` tokens of every row."""

    number: int

    def take(self, x: jax.Array) -> jax.Array:
        """`[rows, number, d]`."""
        return x[:, : self.number]

    def others(self, x: jax.Array) -> jax.Array:
        """`[rows, length − number, d]`."""
        return x[:, self.number :]

    def join(self, others: jax.Array, read: jax.Array) -> jax.Array:
        """`[rows, length, d]`."""
        return jnp.concatenate([read.astype(others.dtype), others], axis=1)


@dataclass(frozen=True)
class Places:
    """The tokens at some places.

    Attributes:
        places: int32 `[shares, n]`: the batch's tokens are divided into equal shares, and places count within one. They may repeat.
    """

    places: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """`[shares, n, d]`."""
        shares = x.reshape(len(self.places), -1, x.shape[-1])
        return jnp.take_along_axis(shares, self.places[..., None], axis=1)

    def others(self, x: jax.Array) -> jax.Array:
        """All tokens: those at the places are replaced afterwards."""
        return x

    def join(self, others: jax.Array, read: jax.Array) -> jax.Array:
        """`others` with the values of `read` at the places."""
        shares = others.reshape(len(self.places), -1, others.shape[-1])
        return _put(shares, read.astype(others.dtype), self.places).reshape(others.shape)


def move_read_tokens(batch: Mapping[str, Any], places: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """Move the tokens at `places: [rows, n]` to the front of their rows. The order is kept otherwise.

    Args:
        batch: with `input_ids`, `attention_mask` and maybe `token_type_ids`, each `[rows, length]`, and without `position_ids`.
        places: the tokens; a place may repeat.

    Returns:
        the batch, with `position_ids`, the old place of each token, and the new places, `[rows, n]`.
    """
    rows, length = batch["input_ids"].shape
    row = jnp.arange(rows)[:, None]
    is_read = jnp.zeros((rows, length), jnp.int32).at[row, places].set(1)
    after = is_read.sum(1, keepdims=True) + (1 - is_read).cumsum(1) - 1
    moved = jnp.where(is_read > 0, is_read.cumsum(1) - 1, after)  # old place → new place
    order = jnp.zeros((rows, length), jnp.int32).at[row, moved].set(jnp.arange(length, dtype=jnp.int32))
    tokens = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch]
    reordered = {key: jnp.take_along_axis(batch[key], order, axis=1) for key in tokens}
    return {**batch, **reordered, "position_ids": order}, jnp.take_along_axis(moved, places, axis=1)


@jax.custom_vjp
def _put(x: jax.Array, values: jax.Array, places: jax.Array) -> jax.Array:
    first = jnp.where(_repeats(places), x.shape[1], places)  # a place behind the end is dropped
    return x.at[jnp.arange(len(places))[:, None], first].set(values, mode="drop")


def _forward(x: jax.Array, values: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _put(x, values, places), places


def _backward(places: jax.Array, gradient: jax.Array) -> tuple:
    share = jnp.arange(len(places))[:, None]
    own = jnp.where(_repeats(places)[..., None], 0, gradient[share, places])
    return gradient.at[share, places].set(0), own, None


def _repeats(places: jax.Array) -> jax.Array:
    """True for a place that an earlier one of its row repeats. Its value, computed several times, is that of the first one."""
    return jnp.tril(places[:, :, None] == places[:, None, :], -1).any(-1)


_put.defvjp(_forward, _backward)
