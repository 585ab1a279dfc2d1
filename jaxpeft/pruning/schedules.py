"""When to prune and how far: schedules over optimizer steps. Pure values; the masks live elsewhere.

A new schedule is a class that implements `Schedule`, in a file of its own, and a line in `jaxpeft.pruning.SCHEDULES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from jaxpeft.errors import InputError
from jaxpeft.pruning.updates import Change, Pruner, tightened
from jaxpeft.trees import Layers


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """What the schedule of a run is planned from: the run's length and its `--pruning.*` flags. `PruningConfig` has their defaults.

    Attributes:
        sparsity: share that is pruned at the end, below 1.
        num_steps: steps of the run.
        warmup_steps: steps in which the learning rate rises.
        begin: share of the run's steps at which pruning starts; None: a tenth, but not before the warm-up ends.
        end: share of the run's steps at which the sparsity is reached.
        every_steps: steps between two changes of the masks.
        rounds: number of prunings, if they come in rounds.
        rewind: share of the run's steps to whose weights the adapter goes back after each round; 0: the initial ones.
        drop_fraction: share of the kept entries that moves at first, if entries move.
    """

    sparsity: float
    num_steps: int
    warmup_steps: int
    begin: float | None
    end: float
    every_steps: int
    rounds: int
    rewind: float
    drop_fraction: float

    @property
    def first_step(self) -> int:
        """The step at which pruning starts: that of `begin`, or if it is None a tenth of the run, after the warm-up."""
        if self.begin:
            return max(1, round(self.begin * self.num_steps))
        # Not before the warm-up ends: B starts at zero, and its magnitudes carry no information until it has grown.
        return max(1, self.warmup_steps, round(0.1 * self.num_steps))

    @property
    def end_step(self) -> int:
        """The step of `end`."""
        return round(self.end * self.num_steps)


class Schedule(ABC):
    """The sparsity of a run, step by step. Steps count from 1: `due(1)` asks about the end of the first step, `due(0)` about its start.

    Attributes:
        remembers: names in the memory (`jaxpeft.pruning.memory`) that the schedule's changes read or write.
        redraws: by what the schedule grows the entries of a sparse update that it redraws (`jaxpeft.pruning.redraw`); None: it only
            prunes.
    """

    remembers: ClassVar[tuple[str, ...]] = ()
    redraws: ClassVar[Literal["gradient", "random"] | None] = None

    @classmethod
    @abstractmethod
    def plan(cls, options: ScheduleOptions) -> Self:
        """Build the schedule of a run. It reads those of the `options` that it needs, and ignores the rest.

        Raises:
            InputError: if the schedule does not fit into the run.
        """

    @abstractmethod
    def sparsity_at(self, step: int) -> float:
        """The sparsity in force after `step`, in [0, 1)."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """True if the schedule acts after `step`: it changes the masks, or remembers the weights."""

    def changes_masks_at(self, step: int) -> bool:
        """True if the masks change after `step`."""
        return self.due(step)

    def change_at(self, step: int) -> Change:
        """The change after `step`, if it is due: a function at the top level of a module, so that few programs are compiled."""
        return tightened

    def numbers_at(self, step: int) -> dict[str, float]:
        """The numbers that the change after `step` reads (`Moment.numbers`). They are traced."""
        return {}

    def check(self, pruner: Pruner) -> None:
        """Check that the schedule can prune by `pruner`.

        Raises:
            InputError: it cannot.
        """
        return

    def check_start(self, pruner: Pruner, sites: Layers) -> None:
        """Check that the initial `sites` can be pruned before the first step. Called only if `due(0)`.

        Raises:
            InputError: they cannot.
        """
        return

    @property
    @abstractmethod
    def last_step(self) -> int:
        """The step after which the masks are final."""


def refuse_begin(schedule: str, begin: float | None) -> None:
    """Raise InputError if `begin` is set for a schedule whose masks are there from the first step."""
    if begin is not None:
        raise InputError(
            f"pruning.begin {begin:g} has no meaning for pruning.schedule {schedule}, which masks before the first step; set it to null"
        )


@dataclass(frozen=True)
class OneShot(Schedule):
    """Prune once, to `sparsity`, after `step`."""

    sparsity: float
    step: int

    @classmethod
    def plan(cls, options: ScheduleOptions) -> Self:
        """Prune at `begin`.

        Raises:
            InputError: if no step is left after the pruning.
        """
        step, num_steps = options.first_step, options.num_steps
        if step >= num_steps:
            raise InputError(f"pruning begins at step {step}, not below the run's {num_steps}; lower pruning.begin")
        return cls(options.sparsity, step)

    def sparsity_at(self, step: int) -> float:
        """0 until the step of pruning, `sparsity` from there on."""
        return self.sparsity if step >= self.step else 0.0

    def due(self, step: int) -> bool:
        """True at the step of pruning only."""
        return step == self.step

    @property
    def last_step(self) -> int:
        """The step of pruning."""
        return self.step


@dataclass(frozen=True)
class Cubic(Schedule):
    """s_t = s·(1 − (1 − (t − t₀)/(t₁ − t₀))³) between steps t₀ and t₁ (Zhu & Gupta 2017, arXiv 1710.01878, equation 1).

    The masks change every `every_steps` steps after `begin_step`, and last at `end_step`.
    """

    sparsity: float
    begin_step: int
    end_step: int
    every_steps: int

    @classmethod
    def plan(cls, options: ScheduleOptions) -> Self:
        """Raise the sparsity between the steps of `begin` and `end`.

        Raises:
            InputError: if pruning would end before it begins.
        """
        begin_step, end_step = options.first_step, options.end_step
        if end_step <= begin_step:
            raise InputError(
                f"pruning begins at step {begin_step} and ends at {end_step} of {options.num_steps}; "
                "raise pruning.end or lower pruning.begin"
            )
        return cls(options.sparsity, begin_step, end_step, options.every_steps)

    def sparsity_at(self, step: int) -> float:
        """The formula's value, 0 before t₀ and `sparsity` after t₁."""
        progress = (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.sparsity * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)

    def due(self, step: int) -> bool:
        """True every `every_steps` steps between t₀ and t₁, and at t₁."""
        inside = self.begin_step < step < self.end_step
        return step == self.end_step or (inside and (step - self.begin_step) % self.every_steps == 0)

    @property
    def last_step(self) -> int:
        """t₁."""
        return self.end_step
