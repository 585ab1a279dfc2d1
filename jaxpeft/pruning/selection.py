"""From scores to masks: which parameters are pruned, in which pieces, and among which they compete.

Units (`structures.py`) compete within a scope: those of one tensor, of one layer, or of all layers. The count in a scope is
exact, and of equal scores the lower index stays. In a scope wider than a tensor every tensor keeps its best unit, so that
none loses all of its entries: an empty A or B would switch a layer off for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError, check_choice
from jaxpeft.pruning.structures import ELEMENTS, Combine, Groups, Shape, Structure, num_kept
from jaxpeft.trees import Layers

Scope = Literal["tensor", "layer", "global"]
"""Among which units those of one tensor compete. Whole ranks belong to a layer, so for them tensor means layer."""

ALL = "all"
"""Stands for the label in the counts of a layer, and for the layer in those of all layers."""

Units = dict[str, dict[str, jax.Array]]
"""Layer path → label → an array with an element for each unit."""


@dataclass(frozen=True)
class Selection:
    """How masks follow from scores. A value, so that jit takes it as a static argument.

    Attributes:
        prunable: names of the pruned parameters (`Method.prunable`). None: every matrix. A vector scales or shifts whole outputs
            (DoRA's magnitude), so a zero in it would switch an output off.
        structure: the units.
        scope: among which units they compete.
    """

    prunable: tuple[str, ...] | None = None
    structure: Structure = ELEMENTS
    scope: Scope = "tensor"

    def __post_init__(self) -> None:
        """Refuse an unknown scope, and a wide one for groups, which have their own."""
        check_choice("pruning.scope", self.scope, get_args(Scope))
        if isinstance(self.structure, Groups) and self.scope != "tensor":
            raise InputError(
                f"pruning.scope {self.scope} has no meaning for n:m sparsity, which keeps the same number in every group of a tensor; "
                "set it to tensor"
            )

    def prunes(self, name: str, leaf: Any) -> bool:
        """True if the parameter `name` is pruned; `leaf` is its array or shape."""
        return leaf.ndim > 1 if self.prunable is None else name in self.prunable

    def chosen(self, sites: Layers) -> Layers:
        """The pruned parameters among `sites`."""
        found = {path: {k: v for k, v in group.items() if self.prunes(k, v)} for path, group in sites.items()}
        return {path: group for path, group in found.items() if group}

    def counts(self, sites: Layers, sparsity: float) -> Layers:
        """How many units are kept at `sparsity`: a tree of Python integers, layer path → label → count.

        For a layer's scope the label is `ALL`, and for the global scope the layer is `ALL` too. `sites` may be shapes.

        Raises:
            InputError: if the structure does not fit a shape.
        """
        shapes = self._shapes(sites)
        kept = {path: self.structure.count(path, own, sparsity) for path, own in shapes.items()}
        if self.scope == "tensor":
            return kept
        sizes = {path: self.structure.size(own) for path, own in shapes.items()}
        # Every tensor keeps a unit, so a scope keeps at least as many units as it has tensors.
        layers = {path: (sum(own.values()), len(own)) for path, own in sizes.items()}
        if self.scope == "layer":
            return {path: {ALL: max(number, num_kept(size, sparsity))} for path, (size, number) in layers.items()}
        size, number = (sum(each) for each in zip(*layers.values(), strict=True))
        return {ALL: {ALL: max(number, num_kept(size, sparsity))}}

    def units(
        self, scores: Layers, combine: Combine, *, among: Layers | None = None, existing: Layers | None = None
    ) -> Units:
        """The scores of the units from those of the entries; -inf for a unit that does not exist, or that has no entry in `among`.

        Args:
            scores: like the sites.
            combine: how a rank is scored (`Criterion.combine`).
            among: bool, like the sites; None: all. Whether a unit is in it depends on any of its entries.
            existing: bool, like the sites: False on padding; None: there is no padding.
        """
        found = {}
        for path, own in self.chosen(scores).items():
            there = {k: existing[path][k] if existing else jnp.ones(v.shape, bool) for k, v in own.items()}
            units = self.structure.units(own, there, combine)
            if among:
                inside = self.structure.covered({name: among[path][name] for name in own})
                units = {label: jnp.where(inside[label], unit, -jnp.inf) for label, unit in units.items()}
            found[path] = units
        return found

    def keep(self, units: Units, counts: Layers, *, spared: bool = True) -> Units:
        """The units with the highest scores in every scope, as bool. A unit that scores -inf is never kept.

        Args:
            units: the scores.
            counts: how many to keep, from `counts`; Python's integers or traced.
            spared: every tensor keeps its best unit, if the scope is wider than a tensor.
        """
        if self.scope == "tensor":
            kept = {p: {k: self.structure.keep(u, counts[p][k]) for k, u in own.items()} for p, own in units.items()}
        else:
            scores = jax.tree.map(_best_first, units) if spared else units
            if self.scope == "layer":
                kept = {path: self._keep_among(own, counts[path][ALL]) for path, own in scores.items()}
            else:
                kept = self._keep_among(scores, counts[ALL][ALL])
        return jax.tree.map(lambda keep, unit: keep & ~jnp.isneginf(unit), kept, units)

    def least(self, units: Units) -> Layers:
        """The lowest count of every scope, a tree like `counts`: one unit for each of its tensors."""
        if self.scope == "tensor":
            return {path: dict.fromkeys(own, 1) for path, own in units.items()}
        if self.scope == "layer":
            return {path: {ALL: len(own)} for path, own in units.items()}
        return {ALL: {ALL: sum(map(len, units.values()))}}

    def _keep_among(self, units: Any, count: Any) -> Any:
        leaves, tree = jax.tree.flatten(units)
        kept = self.structure.keep(jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), count)
        parts, start = [], 0
        for leaf in leaves:
            parts.append(kept[start : start + leaf.size].reshape(leaf.shape))
            start += leaf.size
        return jax.tree.unflatten(tree, parts)

    def masks(self, kept: Units, sites: Layers, *, existing: Layers | None = None) -> Layers:
        """The masks like `sites` that keep the units `kept`, and every parameter that is not pruned."""
        pruned = {path: self.structure.expand(kept[path], own) for path, own in self._shapes(sites).items()}
        masks = {
            path: {k: pruned.get(path, {}).get(k, jnp.ones(v.shape, bool)) for k, v in group.items()}
            for path, group in sites.items()
        }
        return jax.tree.map(jnp.logical_and, masks, existing) if existing else masks

    def _shapes(self, sites: Layers) -> dict[str, dict[str, Shape]]:
        return {path: {k: tuple(v.shape) for k, v in own.items()} for path, own in self.chosen(sites).items()}


def _best_first(units: jax.Array) -> jax.Array:
    """`units` with the first of the highest scores raised to +inf, so that it is kept."""
    flat = units.reshape(-1)
    best = jnp.argmax(flat)
    return flat.at[best].set(jnp.where(flat[best] > -jnp.inf, jnp.inf, -jnp.inf)).reshape(units.shape)


def existing_entries(sites: Layers, shapes: Mapping[str, Mapping[str, jax.Array]]) -> Layers:
    """Bool, like `sites`: False for entries that are padding behind its own shape in `shapes`, int32 `[dimensions]`, possibly traced."""

    def inside(leaf: jax.Array, own: jax.Array) -> jax.Array:
        indices = (jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis) for axis in range(leaf.ndim))
        result = jnp.ones(leaf.shape, bool)
        for axis, index in enumerate(indices):
            result &= index < own[axis]
        return result

    return jax.tree.map(inside, sites, dict(shapes))
