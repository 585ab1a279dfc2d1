"""Turn epochs and shares of a run into steps: its length, its validations, its learning rate, and its pruning or allocation."""

from __future__ import annotations

import math
from dataclasses import replace

from jaxpeft.adapters import AdaLora, Method
from jaxpeft.config import PruningConfig, TrainingConfig
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCHEDULES, SCORES, Schedule
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.pruning.schedules import ScheduleOptions
from jaxpeft.pruning.selection import Selection
from jaxpeft.pruning.structures import Groups, structure_of
from jaxpeft.pruning.updates import Pruner
from jaxpeft.training.optimizer import learning_rate_schedule
from jaxpeft.training.plan import Plan
from jaxpeft.trees import Adapters, Params, constants_of, leaf_paths, without_shared

# A preempted machine is switched off about 30 seconds after its signal, and a dispatch cannot be interrupted.
_SECONDS_PER_DISPATCH = 20.0
_WARMUP_STEPS = 100


def make_plan(
    training: TrainingConfig,
    pruning: PruningConfig,
    *,
    batches_per_epoch: int,
    metric: str,
    method: Method | None = None,
    dense_share: float = 0.0,
    distributed: bool = False,
) -> Plan:
    """The plan of a run in steps. If `method` is AdaLoRA, its allocation takes the place of pruning.

    Args:
        training: the training flags.
        pruning: the pruning flags.
        batches_per_epoch: micro-steps in one pass over the training rows.
        metric: the metric that selects the best adapter, if `training.metric` does not name one.
        method: the adapter method.
        dense_share: share of the steps that leave no channels of the base out, before those that do.
        distributed: True if several processes train together.

    Raises:
        InputError: warm-up, pruning or the allocation of ranks do not fit into the run.
    """
    t = training
    num_steps = t.num_steps or max(1, round(t.num_epochs * batches_per_epoch / t.accumulation_steps))
    # Not more than a tenth, because the default must suit runs of any length.
    warmup_steps = min(_WARMUP_STEPS, num_steps // 10) if t.warmup_steps is None else t.warmup_steps
    if warmup_steps >= num_steps:
        raise InputError(
            f"training.warmup_steps {warmup_steps} is not below the run's {num_steps} steps; lower it or train longer"
        )
    return Plan(
        num_steps=num_steps,
        accumulation_steps=t.accumulation_steps,
        log_every_steps=t.log_every_steps,
        eval_every_steps=t.eval_every_steps or max(1, -(-num_steps // 10)),
        metric=t.metric or metric,
        warmup_steps=warmup_steps,
        learning_rate=learning_rate_schedule(t.learning_rate, num_steps, warmup_steps, t.schedule),
        pruning=_allocation(method, num_steps)
        if isinstance(method, AdaLora)
        else _pruning(pruning, method, warmup_steps, num_steps, pruner_of(pruning, method)),
        pruner=pruner_of(pruning, method),
        dense_steps=math.ceil(dense_share * num_steps),
        patience=t.early_stopping_patience,
        micro_steps_per_dispatch=t.micro_steps_per_dispatch,
        # All processes must dispatch the same number of micro-steps, but their clocks differ, so no time limit.
        seconds_per_dispatch=math.inf if distributed else _SECONDS_PER_DISPATCH,
    )


def pruner_of(p: PruningConfig, method: Method | None) -> Pruner:
    """Criterion, units and scopes of a run with `method`. Nothing needs to be loaded for it.

    Raises:
        InputError: they do not fit together, or do not fit the method.
    """
    if not p.sparsity:
        return Pruner()
    structure = structure_of(p.structure, method.products if method else ())
    if isinstance(structure, Groups) and abs(p.sparsity - structure.sparsity) > 1e-9:
        raise InputError(
            f"pruning.structure {p.structure} prunes {structure.sparsity:g} of the entries, and pruning.sparsity is {p.sparsity:g}; "
            "give both the same share"
        )
    selection = Selection(method.prunable if method else None, structure, p.scope)
    return Pruner(SCORES[p.criterion], selection, type(method).entry_effects if method else None)


def _pruning(
    p: PruningConfig, method: Method | None, warmup_steps: int, num_steps: int, pruner: Pruner
) -> Schedule | None:
    schedule: type[Schedule] = SCHEDULES[p.schedule]
    redraws = schedule.redraws if method is not None and method.redrawn else None
    if not p.sparsity and not redraws:
        return None
    options = ScheduleOptions(
        sparsity=p.sparsity,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        begin=p.begin,
        end=p.end,
        every_steps=p.every_steps,
        rounds=p.rounds,
        rewind=p.rewind,
        drop_fraction=p.drop_fraction,
    )
    planned = Redraw.plan(options, redraws) if redraws else schedule.plan(options)
    planned.check(pruner)
    return planned


def check_pruning(plan: Plan, adapters: Adapters) -> None:
    """Check that the initial `adapters` can be pruned as `plan` says.

    Raises:
        InputError: the structure does not fit a shape, or the masks come before the first step and all scores of a tensor are equal
            there, so that they choose nothing.
    """
    schedule, pruner, sites = plan.pruning, plan.pruner, adapters["sites"]
    if not isinstance(schedule, Schedule):
        return
    pruner.selection.counts(sites, schedule.sparsity_at(plan.num_steps))
    if schedule.due(0):
        schedule.check_start(pruner, sites)


def check_redraw(plan: Plan, frozen: Params) -> None:
    """Check that there are entries to take up, if `plan` redraws those of a sparse update. `frozen` has the initial ones.

    Raises:
        InputError: if all entries of a layer train.
    """
    if not isinstance(plan.pruning, Redraw):
        return
    leaves = leaf_paths(without_shared(frozen)[0])
    for path, group in constants_of(frozen).items():
        number = max(leaf.size for leaf in group.values())
        if number >= leaves[f"{path}/kernel"].size:
            raise InputError(
                f"all {number} entries of layer {path} train, so there are none to redraw; train fewer (adapter.rank, adapter.sparsity), "
                "or set pruning.schedule to one-shot"
            )


def _allocation(method: AdaLora, num_steps: int) -> Allocation:
    """AdaLoRA's schedule over the whole run, or over its first `total_step` steps."""
    total = method.total_step or num_steps
    if total > num_steps:
        raise InputError(
            f"adapter.options.total_step {total} exceeds the run's {num_steps} steps; train longer, or leave it out"
        )
    last = total - method.tfinal
    if method.tinit >= last:
        raise InputError(
            f"AdaLoRA's ranks fall from step {method.tinit} (adapter.tinit) to {last}, which is adapter.tfinal {method.tfinal} "
            f"before the end of {total}: lower one of them, or train longer"
        )
    return Allocation(method.init_r, method.target_r, method.tinit, last, method.deltaT, method.beta1, method.beta2)


def with_length(method: Method | None, num_steps: int) -> Method | None:
    """`method` with the length of the run in it, because an AdaLoRA file names the length of its schedule."""
    if isinstance(method, AdaLora) and method.total_step is None:
        return replace(method, total_step=num_steps)
    return method
