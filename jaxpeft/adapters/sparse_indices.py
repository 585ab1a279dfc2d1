"""Which entries of a kernel a sparse update may change, and how they are drawn again during training.

An entry is named by its flat index in torch's layout `[out, in]`, o·d_in + i for the entry `[i, o]` of a Flax kernel, because
PEFT's files name it so. If entries have equal scores, the one with the lower flat index wins.

    random      every entry is equally likely                                  SHiRA-Rand, arXiv 2406.13175, section 4.1
    magnitude   the largest |W₀|                                               SHiRA-WM; Super-Tuning, arXiv 2607.09287
    smallest    the smallest |W₀|                                              Super-Tuning, `-bottom`
    gradient    the largest |∂loss/∂W| of the base on training batches         SHiRA-Grad
    block       whole squares of the kernel, those with the largest mean W₀²
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import Site
from jaxpeft.errors import InputError, check_choice

Choice = Literal["random", "magnitude", "smallest", "gradient", "block"]
"""How the entries are chosen."""


def choose_indices(
    choice: str,
    num_entries: int,
    site: Site,
    *,
    rng: jax.Array,
    kernel: Callable[[], jax.Array],
    gradient: jax.Array | None = None,
    block_size: int = 8,
) -> jax.Array:
    """The flat indices of the chosen entries of `site`'s kernel, ascending: `[num_entries]` int32.

    Args:
        choice: one of `Choice`.
        num_entries: how many entries to choose, from 1 to d_in·d_out.
        site: the layer.
        rng: key of the random choice.
        kernel: returns the frozen kernel `[d_in, d_out]` in fp32.
        gradient: that of the kernel, `[d_in, d_out]`, for "gradient".
        block_size: the side of a square, in entries, for "block". The last square is cut to `num_entries`.

    Raises:
        InputError: for an unknown choice, or if the gradient is missing or is not one of this layer.
    """
    check_choice("mask_type", choice, get_args(Choice))
    if choice == "random":
        return jnp.sort(jax.random.permutation(rng, site.d_in * site.d_out)[:num_entries]).astype(jnp.int32)
    if choice == "gradient":
        return jnp.sort(largest(flat(jnp.abs(_checked(gradient, site))), num_entries))
    if choice == "block":
        return jnp.sort(_in_blocks(kernel(), num_entries, block_size))
    magnitude = flat(jnp.abs(kernel()))
    return jnp.sort(largest(magnitude if choice == "magnitude" else -magnitude, num_entries))


def flat(matrix: jax.Array) -> jax.Array:
    """The entries of `matrix: [d_in, d_out]` in the order of torch's layout: `[d_in·d_out]`."""
    return matrix.T.reshape(-1)


def largest(scores: jax.Array, num_entries: int) -> jax.Array:
    """The indices of the `num_entries` largest of `scores: [n]`, int32, the largest first. Ties keep the lower index."""
    return jax.lax.top_k(scores, num_entries)[1].astype(jnp.int32)


def places(indices: jax.Array, d_in: int) -> tuple[jax.Array, jax.Array]:
    """The rows and the columns of a Flax kernel `[d_in, d_out]` that the flat `indices` name."""
    return indices % d_in, indices // d_in


def check_indices(indices: jax.Array, size: int, what: str) -> None:
    """Raise InputError unless `indices: [n]` are different numbers from 0 to `size` − 1; `what` names them."""
    found = np.asarray(indices)
    outside = found[(found < 0) | (found >= size)]
    if outside.size:
        raise InputError(f"{what} has the index {outside[0]}, outside 0 to {size - 1}: it belongs to another base")
    values, counts = np.unique(found, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"{what} has the index {values[counts > 1][0]} more than once; give every entry one value")


def redraw(
    indices: jax.Array, values: jax.Array, scores: jax.Array, num_redrawn: int | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Give up the entries with the smallest |value|, and take up those with the highest scores that are not in use.

    With |gradient| of the whole kernel as scores this is RigL (Evci et al. 2020, arXiv 1911.11134, section 3), with random scores
    SET (Mocanu et al. 2018, arXiv 1707.04780). A new entry starts at zero. It may be one that was just given up, as in RigL.
    Pure, of static shapes: `num_redrawn` may be traced.

    Args:
        indices: the flat indices in use, `[n]` int32, all different.
        values: the trained values at them, `[n]`.
        scores: the score of every entry of the kernel, in the order of torch's layout: `[d_in·d_out]`, finite.
        num_redrawn: how many entries to give up, from 0 to n.

    Returns:
        the new indices and values, and `kept: [n]` bool. If it is True, the slot holds the entry that it held. If it is
        False, the optimizer's moments of the slot belong to the old entry and must be set to zero.
    """
    n = indices.shape[0]
    # The place of every slot by |value|, the smallest first; of equal values the one with the higher index.
    order = jnp.lexsort((-indices, jnp.abs(values)))
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32))
    kept = rank >= num_redrawn
    # An index beyond the end is dropped, so a slot that is given up blocks nothing.
    in_use = jnp.where(kept, indices, scores.size)
    free = scores.at[in_use].set(-jnp.inf, mode="drop")
    new = largest(free, n)[rank]
    return jnp.where(kept, indices, new), jnp.where(kept, values, 0), kept


def _in_blocks(kernel: jax.Array, num_entries: int, block_size: int) -> jax.Array:
    """The entries of the squares with the largest mean square, square by square; those at the edges may be smaller."""
    d_in, d_out = kernel.shape
    across = -(-d_in // block_size)
    index = jnp.arange(d_in * d_out, dtype=jnp.int32)
    row, column = places(index, d_in)
    block = (column // block_size) * across + row // block_size
    num_blocks = across * -(-d_out // block_size)
    sizes = jnp.zeros(num_blocks).at[block].add(1.0)
    means = jnp.zeros(num_blocks).at[block].add(jnp.square(flat(kernel))) / sizes
    rank = (
        jnp.zeros(num_blocks, jnp.int32)
        .at[jnp.argsort(-means, stable=True)]
        .set(jnp.arange(num_blocks, dtype=jnp.int32))
    )
    return jnp.argsort(rank[block], stable=True)[:num_entries].astype(jnp.int32)


def _checked(gradient: jax.Array | None, site: Site) -> jax.Array:
    if gradient is None:
        raise InputError(
            f"mask_type 'gradient' needs the gradient of layer {site.path}: give init_adapters(statistics=…) what "
            "jaxpeft.calibration.calibrate returns"
        )
    if gradient.shape != (site.d_in, site.d_out):
        raise InputError(
            f"the gradient measured at layer {site.path} has shape {list(gradient.shape)}; its kernel is [{site.d_in}, {site.d_out}]"
        )
    return gradient
