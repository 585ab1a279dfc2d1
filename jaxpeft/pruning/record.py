"""A record of the masks after a step at which they changed: a line of a run's `sparsity.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.pruning.masks import num_changed
from jaxpeft.trees import Layers, by_leaf

_PRODUCTS = (("a", "b"), ("w1_b", "w1_a"), ("w2_b", "w2_a"))
"""Names of the two factors of a product, `[d_in, r]` and `[r, d_out]`: LoRA's and HiRA's, LoHa's and LoKr's."""


def mask_record(step: int, masks: Layers, previous_masks: Layers) -> dict[str, Any]:
    """The record of `masks` after step `step`. Pure; computed on the host.

    Args:
        step: the optimizer step after which the masks are in force.
        masks: layer path → parameter → bool, True = keep; or, if a sparse update is redrawn, layer path → "indices" → int32.
        previous_masks: the masks before; {} if nothing was pruned.

    Returns:
        step: the step.
        kept, size: "layer/path:parameter" → its entries that are kept, and all of them. A sparse update has its entries in both.
        ranks: layer path → the ranks k that have a kept entry on both sides, in column k of A and in row k of B. A layer with two
            products (LoHa) has the ranks of the fuller one, or 0 if one product is pruned as a whole. AdaLoRA has its triplets. A
            layer without ranks is left out.
        churn: share of all entries that were pruned or grown again since `previous_masks`, from 0 to 1; of a sparse update those
            that are new.
    """
    arrays = {path: {name: np.asarray(mask) for name, mask in group.items()} for path, group in masks.items()}
    before = by_leaf(previous_masks)
    changed, kept, size = 0, {}, {}
    for path, group in arrays.items():
        for name, mask in group.items():
            kept[f"{path}:{name}"] = int(mask.sum()) if mask.dtype == bool else mask.size
            size[f"{path}:{name}"] = mask.size
            old = before.get(f"{path}/{name}")
            changed += num_changed(np.ones_like(mask) if old is None else np.asarray(old), mask)
    ranks = {path: left for path, group in arrays.items() if (left := ranks_left(group)) is not None}
    return {"step": step, "kept": kept, "size": size, "ranks": ranks, "churn": changed / max(sum(size.values()), 1)}


def ranks_left(masks: Mapping[str, np.ndarray]) -> int | None:
    """The number of ranks that a layer's `masks` keep; None if the layer has no ranks."""
    if "e" in masks:
        return int(masks["e"].sum())
    counts = []
    for wide, tall in _PRODUCTS:
        sides = ([masks[wide].any(0)] if wide in masks else []) + ([masks[tall].any(1)] if tall in masks else [])
        counts += [int(np.all(sides, axis=0).sum())] if sides else []
    return (max(counts) if all(counts) else 0) if counts else None
