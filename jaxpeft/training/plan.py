"""The plan of a run in steps: its length, when it logs, validates and prunes, and the size of its dispatches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxpeft.pruning import Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.updates import Pruner


@dataclass(frozen=True)
class Plan:
    """The plan of a run. A step is one optimizer step; a micro-step computes the gradients of one batch.

    Attributes:
        num_steps: steps of the run.
        accumulation_steps: micro-steps per step; their gradients are averaged.
        log_every_steps: steps between two log lines.
        eval_every_steps: steps between two validations.
        metric: the validation metric that selects the best adapter.
        learning_rate: step → learning rate.
        pruning: the schedule of pruning; None for a dense adapter; an `Allocation` for AdaLoRA.
        pruner: what a `Schedule` prunes by: criterion, units and scopes. An `Allocation` has its own scores.
        dense_steps: the first steps, which leave no channels of the base out.
        patience: number of validations without improvement after which the run stops; None: never.
        micro_steps_per_dispatch: maximum micro-steps per compiled call.
        seconds_per_dispatch: maximum estimated seconds per call, because a stop signal waits for it. It must be infinite if
            several processes train together: they measure different seconds, but must dispatch the same micro-steps.
        warmup_steps: steps over which `learning_rate` rises.
    """

    num_steps: int
    accumulation_steps: int
    log_every_steps: int
    eval_every_steps: int
    metric: str
    learning_rate: Callable[[int], float]
    pruning: Schedule | Allocation | None = None
    pruner: Pruner = field(default_factory=Pruner)
    dense_steps: int = 0
    patience: int | None = None
    micro_steps_per_dispatch: int = 1
    seconds_per_dispatch: float = math.inf
    warmup_steps: int = 0

    @property
    def allocation(self) -> Allocation | None:
        """AdaLoRA's schedule, or None for other methods."""
        return self.pruning if isinstance(self.pruning, Allocation) else None

    @property
    def remembers(self) -> tuple[str, ...]:
        """Names of what pruning remembers between steps (`jaxpeft.pruning.memory`). An allocation's importance is not among them."""
        if not isinstance(self.pruning, Schedule):
            return ()
        own = self.pruner.criterion.remembers
        return (*self.pruning.remembers, *((own,) if own and own not in self.pruning.remembers else ()))

    def next_event(self, step: int) -> int:
        """The next step after `step` at which to log, validate, prune or become sparse, or else the last step."""
        following = range(step + 1, self.num_steps)
        return next((after for after in following if self._is_event(after)), self.num_steps)

    def _is_event(self, step: int) -> bool:
        return step == self.dense_steps or self.prunes_at(step) or self.logs_at(step) or self.validates_at(step)

    def prunes_at(self, step: int) -> bool:
        """True if the schedule of pruning acts after `step`: it changes the masks, or remembers the weights."""
        return self.pruning is not None and self.pruning.due(step)

    def logs_at(self, step: int) -> bool:
        """True if `step` is on the interval of log lines. The last step is always logged."""
        return step % self.log_every_steps == 0

    def validates_at(self, step: int) -> bool:
        """True if `step` is on the interval of validations. The last step is always validated."""
        return step % self.eval_every_steps == 0

    def micro_steps_at_once(self, seconds_per_step: float) -> int:
        """The number of micro-steps to dispatch together, if a step takes `seconds_per_step`.

        It is 1 if a dispatch has a time limit and `seconds_per_step` is not known yet (infinite).
        """
        if math.isinf(self.seconds_per_dispatch):
            return self.micro_steps_per_dispatch
        seconds = max(seconds_per_step / self.accumulation_steps, 1e-9)
        return max(1, min(self.micro_steps_per_dispatch, int(self.seconds_per_dispatch / seconds)))

    def up_to_whole_steps(self, done: int, most: int) -> int:
        """The number of micro-steps, at most `most`, to dispatch after the `done` ones.

        If possible it leads to the end of a step, because stop signals are checked only there.
        """
        size = self.accumulation_steps
        begun = done % size
        return min(most, size - begun) if begun or most < size else most // size * size

    def may_be_best(self, step: int) -> bool:
        """True if the adapter of `step` may be the best one, because it has its final sparsity.

        An adapter from before the last pruning is denser than the configuration asks for. The entries of a sparse update that is redrawn
        are final only then.
        """
        return self.pruning is None or step >= self.pruning.last_step
