"""Straight-through: masks act in the forward pass only, and gradients reach all entries (Sanh et al. 2020, arXiv 2005.07683, section 4).

All weights train. Every few steps the masks are chosen anew from all of them, so an entry may come back. At the end the masks become
hard: what they prune is zero from there on. The sparsity rises along the cubic of Zhu & Gupta (2017), as in the paper. With the
criterion movement this is movement pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.pruning.masks import apply_masks
from jaxpeft.pruning.schedules import Cubic
from jaxpeft.pruning.updates import Change, Moment, Pruned, Pruner, scored_units


@dataclass(frozen=True)
class StraightThrough(Cubic):
    """The sparsity of `Cubic`, with masks that are soft until `end_step`."""

    remembers: ClassVar[tuple[str, ...]] = ("soft",)

    def change_at(self, step: int) -> Change:
        """Choose the masks anew."""
        return chosen_anew

    def numbers_at(self, step: int) -> dict[str, float]:
        """`hard`: 1 at the last step, when the masks become hard."""
        return {"hard": float(step == self.end_step)}


def chosen_anew(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Keep the units with the highest scores of all, also of those that are masked now. Weights become zero only if `hard`."""
    kept = pruner.selection.keep(scored_units(before, moment, pruner, among=None), moment.counts)
    masks = pruner.selection.masks(kept, before.sites, existing=moment.existing)
    hard = moment.numbers["hard"] > 0
    sites = jax.tree.map(lambda masked, w: jnp.where(hard, masked, w), apply_masks(before.sites, masks), before.sites)
    return Pruned(sites, masks, {**before.memory, "soft": ~hard})
