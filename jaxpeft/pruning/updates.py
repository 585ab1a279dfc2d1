"""Changes of the masks: what happens to weights, masks and memory when a schedule acts.

A change is a pure function that jit can compile, and a schedule names it for each of its steps (`Schedule.change_at`). The two
of schedules that only prune more are here; the others are beside their schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax

from jaxpeft.errors import InputError
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.pruning.memory import Memory
from jaxpeft.pruning.scores import Criterion, Effects, magnitude
from jaxpeft.pruning.selection import Selection, Units
from jaxpeft.pruning.structures import Ranks
from jaxpeft.trees import Layers


@dataclass(frozen=True)
class Pruner:
    """Criterion and selection of a run: a value, and a static argument of the compiled change.

    Attributes:
        criterion: scores the entries.
        selection: the pruned parameters, in which units and scopes.
        effects: how entries change the method's update (`Method.entry_effects`), or None.
    """

    criterion: Criterion = magnitude
    selection: Selection = field(default_factory=Selection)
    effects: Effects | None = None

    def __post_init__(self) -> None:
        """Refuse a criterion that the method or the scope does not allow."""
        if self.criterion.needs_effects and self.effects is None:
            raise InputError(
                "pruning.criterion product needs a method that says how its entries change the update (entry_effects); choose another"
            )
        structure = self.selection.structure
        # The norms of one product are those of the update. Those of one product among several, or in a larger expression, are not.
        ranked_by_norms = (
            isinstance(structure, Ranks) and len(structure.products) == 1 and self.criterion.combine == "norms"
        )
        if self.selection.scope != "tensor" and not self.criterion.comparable and not ranked_by_norms:
            raise InputError(
                f"pruning.scope {self.selection.scope} compares scores of different tensors, and this criterion's have no common "
                "unit: (A/c, cB) is the same adapter for every c; choose pruning.criterion product, snip, movement or random, or set "
                "pruning.scope to tensor"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pruned:
    """The state that a change may change.

    Attributes:
        sites: the adapter's parameters.
        masks: bool, like the sites; True = keep.
        memory: what pruning remembers.
        fresh: {} or bool, like the sites: entries whose optimizer moments start anew.
    """

    sites: Layers
    masks: Layers
    memory: Memory
    fresh: Layers = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moment:
    """The further inputs of a change. All of them may be traced.

    Attributes:
        counts: units kept in each scope, from `Selection.counts`.
        numbers: numbers of the schedule by name (`Schedule.numbers_at`).
        rng: the run's typed key.
        existing: bool, like the sites: False on padding; None: there is no padding.
    """

    counts: Layers
    numbers: Mapping[str, Any]
    rng: jax.Array
    existing: Layers | None = None


class Change(Protocol):
    """A function `(before, moment, pruner) → after`."""

    def __call__(self, before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
        """The weights, masks and memory after the change."""


def scored_units(before: Pruned, moment: Moment, pruner: Pruner, *, among: Layers | None) -> Units:
    """The scores of the units by the run's criterion; -inf for what has no entry in `among` (None: all)."""
    context = {"memory": before.memory, "rng": moment.rng, "effects": pruner.effects}
    scores = pruner.criterion(before.sites, **context)
    return pruner.selection.units(scores, pruner.criterion.combine, among=among, existing=moment.existing)


def tightened(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Of the units that are kept, keep those with the highest scores, and set the other entries to zero for good."""
    kept = pruner.selection.keep(scored_units(before, moment, pruner, among=before.masks), moment.counts)
    masks = jax.tree.map(
        lambda new, old: new & old, pruner.selection.masks(kept, before.sites, existing=moment.existing), before.masks
    )
    return Pruned(apply_masks(before.sites, masks), masks, before.memory)
