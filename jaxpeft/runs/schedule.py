"""A run's epochs and shares as updates: how long, when validated, at which rate, and what is pruned or allocated when."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxpeft.adapters import AdaLora, Method
from jaxpeft.config import RunConfig
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCHEDULES, SCORES, Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.training.loop import Plan
from jaxpeft.training.optimizer import learning_rate_schedule

# A preempted machine is gone about 30 seconds after its signal, and a dispatch cannot be cut short.
_SECONDS_PER_DISPATCH = 20.0


def make_plan(config: RunConfig, passes_per_epoch: int, metric: str, *, method: Method | None = None) -> Plan:
    """Turn epochs and shares of the run into updates; an AdaLoRA `method` brings a schedule of its own.

    Raises:
        InputError: where warm-up, pruning or the allocation of ranks do not fit into the run.
    """
    t = config.training
    num_steps = t.num_steps or max(1, round(t.num_epochs * passes_per_epoch / t.accumulation_steps))
    if t.warmup_steps >= num_steps:
        raise InputError(
            f"training.warmup_steps {t.warmup_steps} is not below the run's {num_steps} updates; lower it or train longer"
        )
    return Plan(
        num_steps=num_steps,
        accumulation_steps=t.accumulation_steps,
        log_every_steps=t.log_every_steps,
        eval_every_steps=t.eval_every_steps or max(1, -(-num_steps // 10)),
        metric=t.metric or metric,
        learning_rate=learning_rate_schedule(t.learning_rate, num_steps, t.warmup_steps, t.schedule),
        pruning=_allocation(method, num_steps) if isinstance(method, AdaLora) else _pruning(config, num_steps),
        criterion=SCORES[config.pruning.criterion],
        patience=t.early_stopping_patience,
        passes_per_dispatch=t.steps_per_dispatch,
        # Several processes must dispatch alike, and each has a clock of its own.
        seconds_per_dispatch=math.inf if config.distributed else _SECONDS_PER_DISPATCH,
    )


def _pruning(config: RunConfig, num_steps: int) -> Schedule | None:
    p = config.pruning
    if not p.sparsity:
        return None
    schedule: type[Schedule] = SCHEDULES[p.schedule]
    return schedule.plan(
        sparsity=p.sparsity,
        num_steps=num_steps,
        warmup_steps=config.training.warmup_steps,
        begin=p.begin,
        end=p.end,
        every_steps=p.every_steps,
    )


def _allocation(method: AdaLora, num_steps: int) -> Allocation:
    """AdaLoRA's schedule over the run, or over the first `total_step` updates of it."""
    total = method.total_step or num_steps
    if total > num_steps:
        raise InputError(
            f"adapter.total_step {total} exceeds the run's {num_steps} updates; train longer, or leave it out"
        )
    last = total - method.tfinal
    if method.tinit >= last:
        raise InputError(
            f"AdaLoRA's ranks fall from update {method.tinit} (adapter.tinit) to {last}, which is adapter.tfinal {method.tfinal} "
            f"before the end of {total}: lower one of them, or train longer"
        )
    return Allocation(method.init_r, method.target_r, method.tinit, last, method.deltaT, method.beta1, method.beta2)


def with_length(method: Method | None, num_steps: int) -> Method | None:
    """AdaLoRA's file says how many updates its schedule was made for."""
    if isinstance(method, AdaLora) and method.total_step is None:
        return replace(method, total_step=num_steps)
    return method
