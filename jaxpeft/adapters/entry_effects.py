"""How much an update ΔW changes if one entry of an adapter is set to zero. The criterion "product" of pruning scores by it.

An update is linear in every single entry w, although not in all of them together. So without w it loses exactly w·∂ΔW/∂w, and the
effect of w is the Frobenius norm |w|·‖∂ΔW/∂w‖. It has the same unit in all tensors and layers, and does not change if factors are
rescaled against each other, such as (A/c, c·B). The scaling s of a method is left out.

Over all entries of a rank (column k of L with row k of R) the root of the sum of squares is, for L as for R, the norm of what the update
loses with the whole rank, because entries of one column of L change different rows of the update, or blocks of it.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

EntryEffects = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
"""A layer's parameters, name → array → the effect of every entry, alike."""


def of_entries(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """|w|: the parameters are themselves entries of the update."""
    return jax.tree.map(jnp.abs, params)


def of_factors(left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The effects |L_ik|·‖R_k·‖ and |R_kj|·‖L_·k‖ on a product L·R of `left: [n, r]` and `right: [r, m]`.

    ∂(L·R)/∂L_ik is row k of R in row i, and ∂(L·R)/∂R_kj is column k of L in column j.
    """
    rows, columns = jnp.linalg.norm(right, axis=1), jnp.linalg.norm(left, axis=0)
    return jnp.abs(left) * rows, jnp.abs(right) * columns[:, None]


def of_product(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """`of_factors` for an update A·B. Parameters besides `a` and `b` get |w|; they are not pruned."""
    a, b = of_factors(params["a"], params["b"])
    return {**of_entries(params), "a": a, "b": b}
