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
from typing import Any, Literal, Self

from jaxpeft.errors import InputError
from jaxpeft.pruning.rewire import moving_share
from jaxpeft.pruning.schedules import Schedule


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
    def plan(
        cls,
        *,
        sparsity: float,
        num_steps: int,
        warmup_steps: int,
        begin: float | None,
        end: float,
        every_steps: int,
        growth: Literal["gradient", "random"] = "gradient",
        drop_fraction: float = 0.3,
        **options: Any,
    ) -> Self:
        """Redraw until the step of `end`.

        Args:
            sparsity: 0.
            num_steps: as in `Schedule.plan`, like the next two.
            warmup_steps: see there.
            begin: None, because the entries are there from the start.
            end: share of the run's steps at which the entries are final.
            every_steps: steps between two redraws.
            growth: which entries are taken up.
            drop_fraction: f, the share of the entries that is exchanged at first.
            **options: ignored.

        Raises:
            InputError: if `begin` is set, or if no step is left to redraw.
        """
        if begin is not None:
            raise InputError(
                f"pruning.begin {begin:g} has no meaning for a sparse update, whose entries train from the first step on; set it to null"
            )
        end_step = round(end * num_steps)
        if every_steps >= end_step:
            raise InputError(
                f"pruning.every_steps {every_steps} is not below step {end_step}, at which redrawing ends; lower it, or raise pruning.end"
            )
        return cls(growth, end_step, every_steps, drop_fraction)

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
