"""Masks over adapter parameters: which entries exist. Bool trees shaped like the adapters' sites; True = keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.trees import Layers


def num_kept(size: int, sparsity: float) -> int:
    """Entries kept of `size` at `sparsity` in [0, 1): `max(1, round(size·(1 − sparsity)))`, exactly."""
    return max(1, round(size * (1 - sparsity)))


def keep_counts(sites: Layers, sparsity: float) -> Layers:
    """`num_kept` of every matrix, and all of every vector: a tree of Python integers, like `sites`.

    A vector scales or shifts whole outputs (DoRA's magnitude): a zero in it would switch one off. The matrices of a method
    that is pruned are exactly its `Method.prunable`.
    """
    return jax.tree.map(lambda leaf: num_kept(leaf.size, sparsity) if leaf.ndim > 1 else leaf.size, sites)


def keep_largest(score: jax.Array, num_keep: int | jax.Array) -> jax.Array:
    """The mask of the `num_keep` largest entries of `score`; among equals those with the lower flat index.

    `num_keep` may be traced, so that one compiled program serves every step of a schedule.
    """
    # argsort is stable, and of the negated scores: equal scores stay in the order of their index.
    order = jnp.argsort(-score.reshape(-1), stable=True)
    rank = jnp.zeros(score.size, jnp.int32).at[order].set(jnp.arange(score.size, dtype=jnp.int32))
    return (rank < num_keep).reshape(score.shape)


def magnitude_masks(sites: Layers, masks: Layers, num_keep: Layers) -> Layers:
    """Magnitude pruning, per tensor: keep the `num_keep` entries of largest |w| of every tensor of `sites`.

    A and B are never ranked together: (A/c, cB) is the same adapter, so their magnitudes have no common unit
    (METHODS: per tensor is the default). Entries that `masks` has pruned already stay behind every other. An empty
    `masks` means dense.
    """
    score = jax.tree.map(jnp.abs, sites)
    if masks:
        score = jax.tree.map(lambda s, keep: jnp.where(keep, s, -1.0), score, masks)
    return jax.tree.map(keep_largest, score, num_keep)


def prune(sites: Layers, sparsity: float) -> Layers:
    """One-shot magnitude masks at `sparsity` (Sparse LoRA; Zhu & Gupta 2017's criterion), exact per tensor.

    Prune after some training: B is zero at the start, so its magnitudes mean nothing there.
    """
    return magnitude_masks(sites, {}, keep_counts(sites, sparsity))


def apply_masks(sites: Mapping[str, Mapping[str, Any]], masks: Mapping[str, Mapping[str, Any]]) -> Layers:
    """`sites` with every pruned entry set to zero; a layer or parameter without a mask is dense."""
    return {
        path: {k: jnp.where(masks[path][k], v, 0) if k in masks.get(path, {}) else v for k, v in params.items()}
        for path, params in sites.items()
    }


def sparsity_of(masks: Layers) -> float:
    """Share of pruned entries over all masks, 0 where there are none."""
    leaves = jax.tree.leaves(masks)
    kept, size = sum(int(m.sum()) for m in leaves), sum(m.size for m in leaves)
    return 1 - kept / size if size else 0.0
