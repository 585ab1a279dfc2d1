"""Masks over adapter parameters: which entries are kept. Bool trees shaped like the adapters' sites; True = keep.

`keep_counts` and `keep_largest` decide the structure of a mask: single entries, counted for each tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.pruning import SCORES
from jaxpeft.trees import Layers


def num_kept(size: int, sparsity: float) -> int:
    """Entries kept of `size` at `sparsity` in [0, 1): `max(1, round(size·(1 − sparsity)))`, exactly."""
    return max(1, round(size * (1 - sparsity)))


def keep_counts(sites: Layers, sparsity: float, prunable: Collection[str] | None = None) -> Layers:
    """How many entries each tensor keeps: a tree of Python integers like `sites`.

    The parameters named in `prunable` (`Method.prunable`) keep `num_kept` entries, the others all of theirs. None names every
    matrix: a vector scales or shifts whole outputs (DoRA's magnitude), so a zero in it would switch an output off.
    """

    def count(path: Any, leaf: jax.Array) -> int:
        pruned = leaf.ndim > 1 if prunable is None else path[-1].key in prunable
        return num_kept(leaf.size, sparsity) if pruned else leaf.size

    return jax.tree_util.tree_map_with_path(count, sites)


def keep_largest(score: jax.Array, num_keep: int | jax.Array) -> jax.Array:
    """The bool mask of the `num_keep` largest entries of `score`, of its shape. Ties keep the lower flat index.

    `num_keep` may be traced, so one compiled program serves every step of a schedule.
    """
    # argsort is stable. It sorts the negated scores, so that equal scores stay in the order of their index.
    order = jnp.argsort(-score.reshape(-1), stable=True)
    rank = jnp.zeros(score.size, jnp.int32).at[order].set(jnp.arange(score.size, dtype=jnp.int32))
    return (rank < num_keep).reshape(score.shape)


def tighten(masks: Layers, scores: Layers, num_keep: Layers) -> Layers:
    """New masks that keep the `num_keep` entries with the highest score in each tensor of `scores`.

    A pruned entry stays pruned as long as `num_keep` does not grow: it ranks below every entry that is still kept.

    Args:
        masks: the masks in force, or {} for a dense adapter.
        scores: from a `Criterion`, like the adapter's sites.
        num_keep: a tree of integers like `scores`, Python's or traced.
    """
    if masks:
        scores = jax.tree.map(lambda score, keep: jnp.where(keep, score, -jnp.inf), scores, masks)
    return jax.tree.map(keep_largest, scores, num_keep)


def prune(sites: Layers, sparsity: float, *, criterion: str = "magnitude") -> Layers:
    """One-shot masks that prune a share `sparsity` of each matrix of `sites`, exactly.

    Prune after some training: B is zero at initialisation, so its magnitudes carry no information there.

    >>> masks = prune(adapters["sites"], 0.5)
    >>> sites = apply_masks(adapters["sites"], masks)

    Args:
        sites: the adapter's parameters, layer path → name → array.
        sparsity: share that is pruned, in [0, 1).
        criterion: a name in `jaxpeft.pruning.SCORES`.

    Raises:
        InputError: if there is no such criterion.
    """
    return tighten({}, SCORES[criterion](sites), keep_counts(sites, sparsity))


def apply_masks(sites: Mapping[str, Mapping[str, Any]], masks: Mapping[str, Mapping[str, Any]]) -> Layers:
    """`sites` with every pruned entry set to zero. A layer or parameter without a mask is dense."""
    # A selection, not a product: 0 · NaN is NaN, and a pruned entry must be zero.
    return {
        path: {k: jnp.where(masks[path][k], v, 0) if k in masks.get(path, {}) else v for k, v in params.items()}
        for path, params in sites.items()
    }


def sparsity_of(masks: Layers) -> float:
    """Share of pruned entries over all masks; 0 if there are no masks."""
    leaves = jax.tree.leaves(masks)
    kept, size = sum(int(m.sum()) for m in leaves), sum(m.size for m in leaves)
    return 1 - kept / size if size else 0.0
