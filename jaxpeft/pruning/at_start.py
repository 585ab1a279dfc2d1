"""Masks from before the first step on: only part of the adapter ever trains.

B is zero at the start. Its zeros do not differ, and a mask over them would be as good as any. So a tensor that is zero everywhere
keeps all of its entries, and the sparsity holds for the others (of LoRA: for A). Whole ranks take A's columns and B's rows with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.pruning.schedules import Schedule, ScheduleOptions, refuse_begin
from jaxpeft.pruning.scores import random
from jaxpeft.pruning.structures import Ranks
from jaxpeft.pruning.updates import Change, Moment, Pruned, Pruner, scored_units, tightened
from jaxpeft.trees import Layers


@dataclass(frozen=True)
class AtStart(Schedule):
    """Prune once, to `sparsity`, before the first step."""

    sparsity: float

    @classmethod
    def plan(cls, options: ScheduleOptions) -> Self:
        """Prune before the first step.

        Raises:
            InputError: if `begin` is set.
        """
        refuse_begin("at-start", options.begin)
        return cls(options.sparsity)

    def sparsity_at(self, step: int) -> float:
        """`sparsity`, of the tensors that are not zero."""
        return self.sparsity

    def due(self, step: int) -> bool:
        """True before the first step."""
        return step == 0

    def change_at(self, step: int) -> Change:
        """Prune what is not zero everywhere."""
        return masked_at_start

    def check(self, pruner: Pruner) -> None:
        """Refuse scores that need gradients, and scopes in which zeros would compete.

        Raises:
            InputError: for SNIP or movement, and for a scope wider than a tensor, unless whole ranks are pruned.
        """
        if pruner.criterion.remembers:
            raise InputError(
                "pruning.schedule at-start needs scores without gradients: before the first step B is 0, so every "
                "weight × gradient of an adapter is 0; set pruning.criterion to random, or prune later (one-shot)"
            )
        if pruner.selection.scope != "tensor" and not isinstance(pruner.selection.structure, Ranks):
            raise InputError(
                f"pruning.scope {pruner.selection.scope} cannot be used with pruning.schedule at-start: one of A and B is 0 there and is "
                "not pruned; set it to tensor"
            )

    def check_start(self, pruner: Pruner, sites: Layers) -> None:
        """Refuse scores that are zero in all of a tensor that would be pruned: they choose nothing.

        Raises:
            InputError: for the product-aware score, and for the norms of whole ranks, if B is zero.
        """
        if pruner.criterion is random:
            return
        before = Pruned(sites, {}, {})
        units = scored_units(before, Moment({}, {}, jax.random.key(0)), pruner, among=None)
        for path, own in units.items():
            for label, unit in own.items():
                pruned = label not in sites[path] or bool((sites[path][label] != 0).any())
                if pruned and not bool((unit != 0).any()):
                    raise InputError(
                        f"pruning.schedule at-start finds only scores of 0 in '{label}' of layer {path}, because a factor is 0 before the "
                        "first step; set pruning.criterion to random, or prune later (one-shot)"
                    )

    @property
    def last_step(self) -> int:
        """0."""
        return 0


def masked_at_start(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """`tightened`, but a tensor that is zero everywhere keeps all of its entries, unless whole ranks are pruned."""
    after = tightened(before, moment, pruner)
    if isinstance(pruner.selection.structure, Ranks):
        return after
    masks = jax.tree.map(
        lambda new, old, w: jnp.where((w != 0).any(), new, old), after.masks, before.masks, before.sites
    )
    return Pruned(apply_masks(before.sites, masks), masks, before.memory)
