"""When the entries of a sparse update are redrawn in training: RigL and SET over the entries of frozen kernels.

A sparse update W₀ + S trains the values of a fixed number of entries (`jaxpeft.adapters.sparse_indices`). They exist from the first step
on, and nothing is pruned. Every few steps the share f_t of them with the smallest |value| is given up, and as many others are
taken up:

- RigL (Evci et al. 2020, arXiv 1911.11134, algorithm 1): those with the largest |∂L/∂W₀|.
- SET (Mocanu et al. 2018, arXiv 1707.04780): at random.

f_t = f/2·(1 + cos(πt/T)) until step T, as in `rewire.py`. `jaxpeft.training.redraw` does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from jaxpeft.errors import InputError
from jaxpeft.pruning.rewire import moving_share
from jaxpeft.pruning.schedules import Schedule, ScheduleOptions


@dataclass(frozen=True)
class Redraw(Schedule):
    """Redraw the share `drop_fraction`, which falls to 0, of every layer's entries every `every_steps` steps before `end_step`.

    `growth` says which entries are taken up (`Schedule.redraws`).
    """

    growth: Literal["gradient", "random"]
    end_step: int
    every_steps: int
    drop_fraction: float

    @classmethod
    def plan(cls, options: ScheduleOptions, growth: Literal["gradient", "random"] = "gradient") -> Self:
        """Redraw until the step of `end`; `growth` says which entries are taken up. The sparsity is 0.

        Raises:
            InputError: if `begin` is set, because the entries are there from the start, or if no step is left to redraw.
        """
        if options.begin is not None:
            raise InputError(
                f"pruning.begin {options.begin:g} has no meaning for a sparse update, whose entries train from the first step on; "
                "set it to null"
            )
        every_steps, end_step = options.every_steps, options.end_step
        if every_steps >= end_step:
            raise InputError(
                f"pruning.every_steps {every_steps} is not below step {end_step}, at which redrawing ends; lower it, or raise pruning.end"
            )
        return cls(growth, end_step, every_steps, options.drop_fraction)

    def sparsity_at(self, step: int) -> float:
        """0: nothing is pruned."""
        return 0.0

    def due(self, step: int) -> bool:
        """True every `every_steps` steps before `end_step`."""
        return 0 < step < self.end_step and step % self.every_steps == 0

    def share_at(self, step: int) -> float:
        """f_t: the share of a layer's entries that is exchanged after `step`."""
        return moving_share(self.drop_fraction, step, self.end_step)

    @property
    def last_step(self) -> int:
        """The step of the last redraw."""
        return (self.end_step - 1) // self.every_steps * self.every_steps
