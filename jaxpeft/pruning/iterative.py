"""Pruning in rounds, with rewinding (Frankle & Carbin 2019, arXiv 1803.03635; Renda et al. 2020, arXiv 2003.02389, section 2).

After each of n rounds the share 1 − (1 − s)^(i/n) is pruned: every round prunes the same share of what is left. Then the kept weights
go back to their values after an early step, and train again under the new masks.

Here all rounds are one run of given length. So only the weights at the sites are rewound. The optimizer's moments stay: the first
forgets within about ten steps, and the second keeps the size of the steps right, which zeros would not do at Adam's late step count.
The learning rate and the data go on, as in Renda's fine-tuning, and so do a head and other fully trained modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxpeft.errors import InputError
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.pruning.schedules import Schedule, ScheduleOptions
from jaxpeft.pruning.updates import Change, Moment, Pruned, Pruner, tightened


@dataclass(frozen=True)
class Iterative(Schedule):
    """Prune after each of `steps`, to `sparsity` in the end, and go back to the weights that the adapter had after `rewind_step`."""

    remembers: ClassVar[tuple[str, ...]] = ("rewound",)
    sparsity: float
    steps: tuple[int, ...]
    rewind_step: int

    @classmethod
    def plan(cls, options: ScheduleOptions) -> Self:
        """`rounds` prunings at equal distances, the first at `begin` and the last at `end`. With one round only `begin` counts.

        Raises:
            InputError: if the rounds do not fit between `begin` and `end`, or if the weights are from after the first pruning.
        """
        first, last, rounds, num_steps = options.first_step, options.end_step, options.rounds, options.num_steps
        distance = (last - first) / max(rounds - 1, 1)
        steps = tuple(first + round(i * distance) for i in range(rounds))
        if steps[-1] >= num_steps or (rounds > 1 and distance < 1):
            raise InputError(
                f"{rounds} rounds of pruning from step {first} to {last} do not fit into {num_steps} steps; raise pruning.end (below 1), "
                "or lower pruning.begin or pruning.rounds"
            )
        rewind_step = round(options.rewind * num_steps)
        if rewind_step >= first:
            raise InputError(
                f"pruning.rewind {options.rewind:g} is step {rewind_step}, not before the first pruning at {first}; "
                "lower it or raise pruning.begin"
            )
        return cls(options.sparsity, steps, rewind_step)

    def sparsity_at(self, step: int) -> float:
        """1 − (1 − s)^(i/n) after i of n rounds."""
        done = sum(each <= step for each in self.steps)
        return self.sparsity if done == len(self.steps) else 1 - (1 - self.sparsity) ** (done / len(self.steps))

    def due(self, step: int) -> bool:
        """True after every round, and at the step whose weights are remembered. Those of step 0 are remembered from the start."""
        return step in self.steps or (step == self.rewind_step and step > 0)

    def changes_masks_at(self, step: int) -> bool:
        """True after every round."""
        return step in self.steps

    def change_at(self, step: int) -> Change:
        """Prune and rewind, or remember the weights."""
        return rewound if step in self.steps else remembered

    @property
    def last_step(self) -> int:
        """The last round."""
        return self.steps[-1]


def remembered(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Remember the weights. Nothing else changes."""
    return Pruned(before.sites, before.masks, {**before.memory, "rewound": jax.tree.map(jnp.copy, before.sites)})


def rewound(before: Pruned, moment: Moment, pruner: Pruner) -> Pruned:
    """Prune by the scores of the trained weights; then the kept weights go back to the remembered ones."""
    masks = tightened(before, moment, pruner).masks
    return Pruned(apply_masks(before.memory["rewound"], masks), masks, before.memory)
