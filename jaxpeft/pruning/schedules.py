"""When to prune and how far: schedules over optimizer updates. Pure values; the masks live elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OneShot:
    """Prune once, to `sparsity`, after update `step`."""

    sparsity: float
    step: int

    def sparsity_at(self, step: int) -> float:
        """Target sparsity in force after update `step`."""
        return self.sparsity if step >= self.step else 0.0

    def due(self, step: int) -> bool:
        """Whether the masks change after update `step`."""
        return step == self.step

    @property
    def last_step(self) -> int:
        """The update after which the masks are final."""
        return self.step


@dataclass(frozen=True)
class Cubic:
    """s_t = s·(1 − (1 − (t − t₀)/(t₁ − t₀))³) between updates t₀ and t₁ (Zhu & Gupta 2017, arXiv 1710.01878, equation 1).

    The masks change every `every_steps` updates from `begin_step` on, and finally at `end_step`.
    """

    sparsity: float
    begin_step: int
    end_step: int
    every_steps: int

    def sparsity_at(self, step: int) -> float:
        """Target sparsity of the formula at update `step`."""
        progress = (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.sparsity * (1 - (1 - min(max(progress, 0.0), 1.0)) ** 3)

    def due(self, step: int) -> bool:
        """Whether the masks change after update `step`."""
        inside = self.begin_step < step < self.end_step
        return step == self.end_step or (inside and (step - self.begin_step) % self.every_steps == 0)

    @property
    def last_step(self) -> int:
        """The update after which the masks are final."""
        return self.end_step


Schedule = OneShot | Cubic
