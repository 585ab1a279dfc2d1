"""Epochs and shares of a run as steps: how long, when validated, at which rate, and what is pruned or allocated when."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxpeft.adapters import AdaLora, Method
from jaxpeft.config import PruningConfig, TrainingConfig
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCHEDULES, SCORES, Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.training.optimizer import learning_rate_schedule
from jaxpeft.training.plan import Plan

# A preempted machine is gone about 30 seconds after its signal, and a dispatch cannot be cut short.
_SECONDS_PER_DISPATCH = 20.0


def make_plan(
    training: TrainingConfig,
    pruning: PruningConfig,
    *,
    batches_per_epoch: int,
    metric: str,
    method: Method | None = None,
    distributed: bool = False,
) -> Plan:
    """Turn epochs and shares of the run into steps; an AdaLoRA `method` brings a schedule of its own.

    Raises:
        InputError: if warm-up, pruning or the allocation of ranks do not fit into the run.
    """
    t = training
    num_steps = t.num_steps or max(1, round(t.num_epochs * batches_per_epoch / t.accumulation_steps))
    if t.warmup_steps >= num_steps:
        raise InputError(
            f"training.warmup_steps {t.warmup_steps} is not below the run's {num_steps} steps; lower it or train longer"
        )
    return Plan(
        num_steps=num_steps,
        accumulation_steps=t.accumulation_steps,
        log_every_steps=t.log_every_steps,
        eval_every_steps=t.eval_every_steps or max(1, -(-num_steps // 10)),
        metric=t.metric or metric,
        learning_rate=learning_rate_schedule(t.learning_rate, num_steps, t.warmup_steps, t.schedule),
        pruning=_allocation(method, num_steps)
        if isinstance(method, AdaLora)
        else _pruning(pruning, t.warmup_steps, num_steps),
        criterion=SCORES[pruning.criterion],
        patience=t.early_stopping_patience,
        micro_steps_per_dispatch=t.micro_steps_per_dispatch,
        # Several processes must dispatch alike, and each has a clock of its own.
        seconds_per_dispatch=math.inf if distributed else _SECONDS_PER_DISPATCH,
    )


def _pruning(p: PruningConfig, warmup_steps: int, num_steps: int) -> Schedule | None:
    if not p.sparsity:
        return None
    schedule: type[Schedule] = SCHEDULES[p.schedule]
    return schedule.plan(
        sparsity=p.sparsity,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        begin=p.begin,
        end=p.end,
        every_steps=p.every_steps,
    )


def _allocation(method: AdaLora, num_steps: int) -> Allocation:
    """AdaLoRA's schedule over the run, or over the first `total_step` steps of it."""
    total = method.total_step or num_steps
    if total > num_steps:
        raise InputError(
            f"adapter.total_step {total} exceeds the run's {num_steps} steps; train longer, or leave it out"
        )
    last = total - method.tfinal
    if method.tinit >= last:
        raise InputError(
            f"AdaLoRA's ranks fall from step {method.tinit} (adapter.tinit) to {last}, which is adapter.tfinal {method.tfinal} "
            f"before the end of {total}: lower one of them, or train longer"
        )
    return Allocation(method.init_r, method.target_r, method.tinit, last, method.deltaT, method.beta1, method.beta2)


def with_length(method: Method | None, num_steps: int) -> Method | None:
    """AdaLoRA's file says how many steps its schedule was made for."""
    if isinstance(method, AdaLora) and method.total_step is None:
        return replace(method, total_step=num_steps)
    return method
