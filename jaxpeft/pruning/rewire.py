"""Sparse from the start, and rewired while training: RigL and SET. The number of kept entries never changes.

Before the first step a random mask is drawn for every pruned tensor, B too: its zeros are alike, and kept ones will train. Every few
steps each scope drops the share f_t of its kept entries with the lowest scores, and grows as many of those that were not kept:

- RigL (Evci et al. 2020, arXiv 1911.11134, algorithm 1): the largest |∂L/∂w|, from the mean gradient of the last step.
- SET (Mocanu et al. 2018, arXiv 1707.04780): at random.

f_t = f/2·(1 + cos(πt/T)), until step T. An entry that was dropped in the same change may grow again, as in the papers' code. A grown entry
starts at zero, with fresh moments. Adam's step count goes on, so its first updates are up to three times as large as later ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.pruning.schedules import Schedule, ScheduleOptions, refuse_begin
from jaxpeft.pruning.scores import random
from jaxpeft.pruning.selection import Units
from jaxpeft.pruning.structures import Blocks, Elements
from jaxpeft.pruning.updates import Change, Moment, Pruned, Pruner, scored_units
from jaxpeft.trees import Layers


@dataclass(frozen=True)
class Set(Schedule):
    """Masks of `sparsity` from the first step on; every `every_steps` steps up to `end_step` the share `drop_fraction` moves."""

    name: ClassVar[str] = "set"
    redraws: ClassVar[Literal["gradient", "random"] | None] = "random"
    sparsity: float
    end_step: int
    every_steps: int
    drop_fraction: float

    @classmethod
    def plan(cls, options: ScheduleOptions) -> Self:
        """Rewire until the step of `end`. `begin` must be None, because the masks are there from the start.

        Raises:
            InputError: if `begin` is set, or if no step is left to rewire.
        """
        refuse_begin(cls.name, options.begin)
        every_steps, end_step = options.every_steps, options.end_step
        if every_steps > end_step:
            raise InputError(
                f"pruning.every_steps {every_steps} is beyond step {end_step}, the end of pruning.schedule {cls.name}; lower it, or raise "
                "pruning.end"
            )
        return cls(options.sparsity, end_step, every_steps, options.drop_fraction)

    def sparsity_at(self, step: int) -> float:
        """`sparsity`, always."""
        return self.sparsity

    def due(self, step: int) -> bool:
        """True before the first step, and every `every_steps` steps until `end_step`."""
        return 0 <= step <= self.end_step and step % self.every_steps == 0

    def change_at(self, step: int) -> Change:
        """Draw the masks, or rewire them."""
        return drawn if step == 0 else self._rewired()

    def _rewired(self) -> Change:
        return rewired_at_random

    def numbers_at(self, step: int) -> dict[str, float]:
        """`fraction`: f_t, and `step`, by which SET draws."""
        return {
            "fraction": moving_share(self.drop_fraction, step, self.end_step),
            "step": float(step),
        }

    def check(self, pruner: Pruner) -> None:
        """Refuse units that cannot grow.

        Raises:
            InputError: for whole ranks and n:m.
        """
        if not isinstance(pruner.selection.structure, Elements | Blocks):
            raise InputError(
                f"pruning.schedule {self.name} grows single entries or blocks: a whole rank that starts at zero has no gradient, and "
                "groups of n:m are too small for a share; set pruning.structure to element or to a block such as 8x8"
            )

    @property
    def last_step(self) -> int:
        """The last step at which masks change."""
        return self.end_step // self.every_steps * self.every_steps


@dataclass(frozen=True)
class RigL(Set):
    """As `Set`, but the entries with the largest gradients grow."""

    name: ClassVar[str] = "rigl"
    remembers: ClassVar[tuple[str, ...]] = ("gradient",)
    redraws: ClassVar[Literal["gradient", "random"] | None] = "gradient"

    def _rewired(self) -> Change:
        return rewired_by_gradient


def moving_share(drop_fraction: float, step: int, end_step: int) -> float:
    """f_t: the share of the kept entries that moves after `step`; f at step 0, and 0 at `end_step`."""
    return drop_fraction / 2 * (1 + math.cos(math.pi * step / end_step))


def drawn(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Masks at random, with the exact counts."""
    selection = pruner.selection
    units = selection.units(random(before.sites, rng=moment.rng), "sum", among=before.masks, existing=moment.existing)
    masks = selection.masks(selection.keep(units, moment.counts), before.sites, existing=moment.existing)
    return Pruned(apply_masks(before.sites, masks), masks, before.memory)


def rewired_by_gradient(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Drop the lowest scores, and grow the largest gradients."""
    return _rewired(before, moment, pruner, jax.tree.map(jnp.abs, before.memory["gradient"]))


def rewired_at_random(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Drop the lowest scores, and grow at random."""
    rng = jax.random.fold_in(moment.rng, moment.numbers["step"].astype(jnp.uint32))
    return _rewired(before, moment, pruner, random(before.sites, rng=rng))


def _rewired(before: Pruned, moment: Moment, pruner: Pruner, growth: Layers) -> Pruned:
    selection, existing = pruner.selection, moment.existing
    units = scored_units(before, moment, pruner, among=before.masks)

    def after_dropping(count: jax.Array, least: int) -> jax.Array:
        moving = jnp.floor(moment.numbers["fraction"] * jnp.asarray(count, jnp.float32)).astype(jnp.int32)
        return jnp.maximum(count - moving, least)

    staying = jax.tree.map(after_dropping, moment.counts, selection.least(units))
    stays = selection.keep(units, staying)
    growing = selection.units(growth, "sum", existing=existing)
    outside: Units = jax.tree.map(lambda unit, stay: jnp.where(stay, -jnp.inf, unit), growing, stays)
    missing = jax.tree.map(lambda count, stay: count - stay, moment.counts, staying)
    grown = selection.keep(outside, missing, spared=False)
    kept = jax.tree.map(jnp.logical_or, stays, grown)
    # Blocks count as units: the entries of a block that stays or grows are those of all of it.
    survivors = jax.tree.map(jnp.logical_and, selection.masks(stays, before.sites, existing=existing), before.masks)
    masks = selection.masks(kept, before.sites, existing=existing)
    fresh = jax.tree.map(jnp.logical_not, survivors)
    return Pruned(apply_masks(before.sites, survivors), masks, before.memory, fresh)
