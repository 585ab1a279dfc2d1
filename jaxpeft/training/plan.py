"""When what happens in a run, in steps: logging, validation, pruning, and how many micro-steps one dispatch holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxpeft.pruning import Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.scores import Criterion, magnitude


@dataclass(frozen=True)
class Plan:
    """When what happens. A step is one update by the optimizer; a micro-step is one forward and backward pass.

    Attributes:
        num_steps: steps of the run.
        accumulation_steps: micro-steps whose gradients are averaged into a step.
        log_every_steps: steps between two log lines.
        eval_every_steps: steps between two validations.
        metric: the validation metric that decides which adapter is best.
        learning_rate: step → learning rate.
        pruning: None for a dense adapter; an `Allocation` for AdaLoRA.
        criterion: scores the entries when a `Schedule` prunes; an `Allocation` has its own scores.
        patience: validations without a better metric after which the run stops; None: never.
        micro_steps_per_dispatch: how many one call runs at most.
        seconds_per_dispatch: how long one call may take, as far as is known; a signal waits for it. It must be infinite if several
            processes train together, because they measure different seconds and must dispatch alike.
    """

    num_steps: int
    accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    metric: str
    learning_rate: Callable[[int], float]
    pruning: Schedule | Allocation | None = None
    criterion: Criterion = magnitude
    patience: int | None = None
    micro_steps_per_dispatch: int = 1
    seconds_per_dispatch: float = math.inf

    @property
    def allocation(self) -> Allocation | None:
        """AdaLoRA's schedule, if there is one."""
        return self.pruning if isinstance(self.pruning, Allocation) else None

    def next_event(self, step: int) -> int:
        """The next step after `step` at which to log, evaluate or prune."""
        following = range(step + 1, self.num_steps)
        return next((after for after in following if self._is_event(after)), self.num_steps)

    def _is_event(self, step: int) -> bool:
        return self.prunes_at(step) or self.logs_at(step) or self.validates_at(step)

    def prunes_at(self, step: int) -> bool:
        """Whether the masks change after `step`."""
        return self.pruning is not None and self.pruning.due(step)

    def logs_at(self, step: int) -> bool:
        """Whether a log line is due after `step`, the last one excepted."""
        return step % self.log_every_steps == 0

    def validates_at(self, step: int) -> bool:
        """Whether a validation is due after `step`, the last one excepted."""
        return step % self.eval_every_steps == 0

    def micro_steps_at_once(self, seconds_per_step: float) -> int:
        """How many micro-steps to dispatch together if a step takes `seconds_per_step`; one if that matters and is not known."""
        if math.isinf(self.seconds_per_dispatch):
            return self.micro_steps_per_dispatch
        seconds = max(seconds_per_step / self.accumulation_steps, 1e-9)
        return max(1, min(self.micro_steps_per_dispatch, int(self.seconds_per_dispatch / seconds)))

    def up_to_whole_steps(self, done: int, most: int) -> int:
        """How many of at most `most` micro-steps to dispatch after `done`: to the end of a step, because a signal is looked for there."""
        size = self.accumulation_steps
        begun = done % size
        return min(most, size - begun) if begun or most < size else most // size * size

    def may_be_best(self, step: int) -> bool:
        """Whether the adapter of `step` has its final sparsity: one from before the last pruning is denser than was asked for."""
        return self.pruning is None or step >= self.pruning.last_step
