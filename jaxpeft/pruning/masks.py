"""Masks over adapter parameters: which entries are kept. Bool trees shaped like the adapters' sites; True = keep.

`selection.py` says how masks follow from scores, and `structures.py` in which pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.pruning import SCORES
from jaxpeft.pruning.scores import Effects
from jaxpeft.pruning.selection import Selection
from jaxpeft.pruning.structures import Combine
from jaxpeft.trees import Layers


def keep_counts(sites: Layers, sparsity: float, prunable: Collection[str] | None = None) -> Layers:
    """How many entries each pruned tensor keeps: a tree of Python integers.

    The parameters named in `prunable` (`Method.prunable`) keep `num_kept` entries. None names every matrix: a vector scales or
    shifts whole outputs (DoRA's magnitude), so a zero in it would switch an output off.
    """
    return Selection(None if prunable is None else tuple(prunable)).counts(sites, sparsity)


def tighten(
    masks: Layers,
    scores: Layers,
    num_keep: Layers,
    *,
    selection: Selection | None = None,
    combine: Combine = "sum",
) -> Layers:
    """New masks that keep the `num_keep` units with the highest score in each scope.

    A pruned unit stays pruned as long as `num_keep` does not grow: it ranks below every unit that is still kept. A parameter
    that `selection` does not prune keeps all of its entries.

    Args:
        masks: the masks in force, or {} for a dense adapter.
        scores: from a `Criterion`, like the adapter's sites.
        num_keep: from `keep_counts` or `Selection.counts`; Python's integers or traced.
        selection: what is pruned, in which units and scopes; None: the entries of every tensor in `num_keep`.
        combine: how a whole rank is scored (`Criterion.combine`).
    """
    if selection is None:
        selection = Selection(tuple({name for group in num_keep.values() for name in group}))
    kept = selection.keep(selection.units(scores, combine, among=masks or None), num_keep)
    tighter = selection.masks(kept, scores)
    return jax.tree.map(jnp.logical_and, tighter, masks) if masks else tighter


def prune(
    sites: Layers,
    sparsity: float,
    *,
    criterion: str = "magnitude",
    rng: jax.Array | None = None,
    effects: Effects | None = None,
    prunable: Collection[str] | None = None,
) -> Layers:
    """One-shot masks that prune a share `sparsity` of each matrix of `sites`, exactly.

    Prune after some training: B is zero at initialisation, so its magnitudes carry no information there.

    >>> masks = prune(adapters["sites"], 0.5)
    >>> sites = apply_masks(adapters["sites"], masks)

    Args:
        sites: the adapter's parameters, layer path → name → array.
        sparsity: share that is pruned, in [0, 1).
        criterion: a name in `jaxpeft.pruning.SCORES`.
        rng: a typed key, for the criterion "random".
        effects: how entries change the update (`Lora.entry_effects`), for the criterion "product".
        prunable: as in `keep_counts`.

    Raises:
        InputError: if there is no such criterion, or if it needs what is not given, such as the gradients of a run.
    """
    scored = SCORES[criterion]
    scores = scored(sites, rng=rng, effects=effects)
    return tighten({}, scores, keep_counts(sites, sparsity, prunable), combine=scored.combine)


def apply_masks(sites: Mapping[str, Mapping[str, Any]], masks: Mapping[str, Mapping[str, Any]]) -> Layers:
    """`sites` with every pruned entry set to zero. A layer or parameter without a mask is dense."""
    # A selection, not a product: 0 · NaN is NaN, and a pruned entry must be zero.
    return {
        path: {k: jnp.where(masks[path][k], v, 0) if k in masks.get(path, {}) else v for k, v in params.items()}
        for path, params in sites.items()
    }


def num_changed(before: jax.Array | np.ndarray, after: jax.Array | np.ndarray) -> int:
    """Entries whose mask differs between `before` and `after`. Of the indices of a sparse update: those that are new, in any order."""
    if after.dtype == bool:
        return int((before != after).sum())
    return int(np.isin(np.asarray(after), np.asarray(before), invert=True).sum())


def churn(before: Layers, after: Layers) -> float:
    """Share of entries whose mask differs between `before` and `after`, or of a sparse update's that are new; 0 without masks."""
    changed = [num_changed(*pair) for pair in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    size = sum(mask.size for mask in jax.tree.leaves(after))
    return sum(changed) / size if size else 0.0


def sparsity_of(masks: Layers) -> float:
    """Share of pruned entries over all masks; 0 if there are none. The indices of a sparse update are no mask."""
    leaves = [mask for mask in jax.tree.leaves(masks) if mask.dtype == bool]
    kept, size = sum(int(m.sum()) for m in leaves), sum(m.size for m in leaves)
    return 1 - kept / size if size else 0.0
