"""Runs that train together in one program. Their states are stacked on a leading axis, and they share one frozen base and one step.

Each replica (one of the stacked runs) has its own adapter, optimizer state, masks, order of the data and dropout. Learning rate,
alpha and dropout rate are arguments, so one program serves any values of them. A replica with a smaller rank is padded with
zeros to the largest rank, and masked there: a zero column of A meets a zero row of B, neither has a gradient, and the product
does not change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from jaxpeft.adapters import Method
from jaxpeft.errors import InputError
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.pruning.memory import fresh_memory
from jaxpeft.pruning.schedules import Schedule
from jaxpeft.pruning.updates import Change, Pruner, tightened
from jaxpeft.training.input_pipeline import Data, InputPipeline, in_program, longest_draw
from jaxpeft.training.loop import Holding, RunState
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.objective import Batch, Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import Metrics, TrainState, allocate_step, count_trace, micro_step, prune_step
from jaxpeft.trees import Layers, Params

Settings = Mapping[str, np.ndarray]
"""The values of each replica that the program reads: "learning_rate" and, if the replicas differ in them, "alpha" and "dropout".

Each is `[replicas]` float32.
"""


@struct.dataclass
class Replicas:
    """The states and settings of runs that train together. Every leaf has a first axis `[replicas]`."""

    state: TrainState
    settings: Settings


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stack states on a new first axis.

    If ranks differ, or if only some states have masks, then all get masks. They are False on the padding. All remember what any
    of them remembers (`TrainState.memory`).

    Raises:
        InputError: the states belong to different layers or methods.
    """
    states = [_with_masks(state) for state in states] if _need_masks(states) else list(states)
    names = {name for state in states for name in state.memory}
    states = [_with_memory(state, names) for state in states]
    structures: list[Any] = [jax.tree.structure(state) for state in states]
    if any(structure != structures[0] for structure in structures):
        raise InputError(
            "these runs cannot train together: their adapters have other parameters; train them one by one"
        )
    return jax.tree.map(_stack_leaves, *states)


def unstack(stacked: TrainState, like: Sequence[TrainState]) -> list[TrainState]:
    """Undo `stack`: each replica's state with the shapes of its state in `like` (arrays or shapes), without masks if that has none."""
    return [_replica(stacked, i, own) for i, own in enumerate(like)]


def _replica(stacked: TrainState, i: int, own: TrainState) -> TrainState:
    memory = {name: stacked.memory[name] for name in own.memory}
    stacked = replace(stacked, masks=stacked.masks if own.masks else {}, memory=memory)
    return jax.tree.map(lambda leaf, shape: leaf[i][tuple(map(slice, shape.shape))], stacked, own)


def _need_masks(states: Sequence[TrainState]) -> bool:
    shapes = [jax.tree.map(lambda leaf: leaf.shape, state.adapters["sites"]) for state in states]
    return any(state.masks for state in states) or any(shape != shapes[0] for shape in shapes)


def _with_masks(state: TrainState) -> TrainState:
    sites = state.adapters["sites"]
    return replace(state, masks=state.masks or jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), sites))


def _with_memory(state: TrainState, names: Iterable[str]) -> TrainState:
    missing = set(names) - set(state.memory)
    return replace(state, memory={**state.memory, **fresh_memory(missing, state.adapters["sites"])})


def _stack_leaves(*leaves: jax.Array) -> jax.Array:
    shapes = [leaf.shape for leaf in leaves]
    if any(shape != shapes[0] for shape in shapes):
        largest = np.max(shapes, axis=0)
        leaves = tuple(
            jnp.pad(leaf, [(0, int(n) - m) for n, m in zip(largest, leaf.shape, strict=True)]) for leaf in leaves
        )
    return jnp.stack(leaves)


def settings_of(methods: Sequence[Method | None], learning_rates: Sequence[float]) -> tuple[Method | None, Settings]:
    """The one method of a program that trains runs of all `methods`, and the settings of each run.

    The methods may differ only in rank, alpha and dropout. The result has the largest rank. The alphas in the settings are such
    that each run keeps its own scaling at that rank.
    """
    settings = {"learning_rate": np.asarray(learning_rates, np.float32)}
    method: Any = max(methods, key=lambda each: getattr(each, "rank", None) or 0) if methods[0] else None
    if method is None:
        return None, settings
    dropouts = [getattr(each, "dropout", 0.0) for each in methods]
    if len(set(dropouts)) > 1:
        # Dropout draws with the probability to keep, so 1 minus this setting must equal float32(1 - rate) to the last bit.
        settings["dropout"] = np.float32(1) - np.asarray([np.float32(1 - rate) for rate in dropouts])
    alphas = [_alpha_at(each, method) for each in methods]
    if len(set(alphas)) > 1:
        settings["alpha"] = np.asarray(alphas, np.float32)
    return method if len(set(alphas)) > 1 or alphas[0] is None else replace(method, alpha=alphas[0]), settings


def _alpha_at(method: Any, padded: Any) -> float | None:
    """The alpha that gives `padded`, a method of another rank, the scaling of `method`."""
    if getattr(method, "rank", None) == getattr(padded, "rank", None):
        return getattr(method, "alpha", None)
    if not hasattr(method, "alpha"):
        return None
    return padded.alpha * method.scaling / padded.scaling


def with_settings(objective: Objective, settings: Mapping[str, jax.Array]) -> Objective:
    """The objective of one replica, with its own alpha and dropout from `settings`."""
    options: Any = {name: settings[name] for name in ("alpha", "dropout") if name in settings}
    return replace(objective, method=replace(objective.method, **options)) if options else objective  # type: ignore[type-var]


SweepStep = Callable[[Replicas, Params, Batch], tuple[Replicas, Metrics]]


def make_sweep_step(
    objective: Objective,
    make_optimizer: Callable[[jax.Array], optax.GradientTransformationExtraArgs],
    traces: Counter | None = None,
    *,
    allocation: Allocation | None = None,
    max_grad_norm: float = 0.0,
    tokens_side_by_side: int | None = None,
    micro_batches: MicroBatches = WHOLE,
) -> SweepStep:
    """Return the jitted `(replicas, frozen, batches) → (replicas, metrics)`; `replicas` are donated.

    Batches and metrics have a first axis `[replicas]`; `frozen` has none.

    Args:
        objective: with the method from `settings_of`.
        make_optimizer: peak learning rate (a traced number) → optimizer, with the same chain of transformations as the one
            that made the optimizer states.
        traces: as in `make_train_step`, keyed by the shape of one replica's batch.
        allocation: as in `make_train_step`, and the same for all replicas.
        max_grad_norm: as in `make_train_step`.
        tokens_side_by_side: if the batch of one replica has more tokens, the program computes the replicas one after the other,
            which needs the memory of only one; else in one `vmap`. None: always in one `vmap`.
        micro_batches: as in `make_train_step`, for the batch of one replica.
    """

    def one(settings: Any, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        count_trace(traces, batch)
        optimizer = make_optimizer(settings["learning_rate"])
        return micro_step(
            with_settings(objective, settings),
            optimizer,
            state,
            frozen,
            batch,
            allocation,
            max_grad_norm,
            micro_batches,
        )

    def step(replicas: Replicas, frozen: Params, batches: Batch) -> tuple[Replicas, Metrics]:
        def of(replica: tuple[Any, TrainState, Batch]) -> tuple[TrainState, Metrics]:
            settings, state, batch = replica
            return one(settings, state, frozen, batch)

        each = (replicas.settings, replicas.state, batches)
        in_turn = tokens_side_by_side is not None and math.prod(batches["input_ids"].shape[1:]) > tokens_side_by_side
        state, metrics = jax.lax.map(of, each) if in_turn else jax.vmap(of)(each)
        return replace(replicas, state=state), metrics

    return jax.jit(step, donate_argnums=0)


def sweep_input_pipeline(data: Sequence[Data], parallel: DataParallel) -> InputPipeline:
    """The input pipeline of all replicas' batches, `[replicas, …]`, from one copy of the data. Each replica has its own order.

    The elements of `data` differ only in their seed.
    """
    first = data[0]

    def draw_at(number: int) -> dict[str, np.ndarray]:
        draws = [each.draw(number) for each in data]
        return {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}

    def longest() -> dict[str, np.ndarray]:
        return {name: np.stack([array] * len(data)) for name, array in longest_draw(first).items()}

    assemble = jax.vmap(in_program(first, parallel), in_axes=(None, 0))
    return InputPipeline(draw_at, assemble, parallel.replicate(dict(first.device_data)), parallel.replicate, longest)


@partial(jax.jit, static_argnames=("pruner", "change"))
def prune_replicas(
    state: TrainState,
    counts: Any,
    due: jax.Array,
    numbers: Mapping[str, Any] | None = None,
    shapes: Any = None,
    *,
    pruner: Pruner | None = None,
    change: Change = tightened,
) -> TrainState:
    """`prune_step` for the replicas that are `due`, `[replicas]` bool; the other arrays have a first axis `[replicas]`."""
    pruned = jax.vmap(partial(prune_step, pruner=pruner, change=change))(state, counts, numbers or {}, shapes)
    return _where_due(due, pruned, state)


@jax.jit
def allocate_replicas(state: TrainState, budget: jax.Array, last: jax.Array, due: jax.Array) -> TrainState:
    """`allocate_step` for the replicas that are `due`; all arguments have a first axis `[replicas]`."""
    return _where_due(due, jax.vmap(allocate_step)(state, budget, last), state)


def _where_due(due: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(due.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    def changing(state: TrainState) -> tuple:
        return state.adapters, state.masks, state.memory, state.opt_state

    adapters, masks, memory, opt_state = jax.tree.map(chosen, changing(after), changing(before))
    return replace(before, adapters=adapters, masks=masks, memory=memory, opt_state=opt_state)


def _prune(replicas: Replicas, runs: Sequence[RunState], step: int) -> Replicas:
    schedules, state = [run.plan.pruning for run in runs], replicas.state
    due = np.asarray([schedule is not None and schedule.due(step) for schedule in schedules])
    if not due.any():
        return replicas
    allocations = [schedule for schedule in schedules if isinstance(schedule, Allocation)]
    if allocations:
        budgets = [schedule.budget_at(step, len(state.adapters["sites"])) for schedule in allocations]
        last = [step == schedule.last_step for schedule in allocations]
        return replace(replicas, state=allocate_replicas(state, np.asarray(budgets), np.asarray(last), due))
    shapes = jax.tree.map(
        lambda *leaves: np.asarray([leaf.shape for leaf in leaves], np.int32),
        *[run.state.adapters["sites"] for run in runs],
    )
    # Runs that prune by other criteria, units or changes may train together, and each combination is a program of its own.
    kinds: dict[tuple[Pruner, Change], list[int]] = {}
    for i, schedule in enumerate(schedules):
        if due[i] and isinstance(schedule, Schedule):
            kinds.setdefault((runs[i].plan.pruner, schedule.change_at(step)), []).append(i)
    for (pruner, change), members in kinds.items():
        wanted = {i: _wanted(runs[i], step) for i in members}
        # The program computes the other runs too, and drops the result. Any counts will do for them.
        each = [wanted.get(i, wanted[members[0]]) for i in range(len(runs))]
        counts, numbers = jax.tree.map(lambda *leaves: np.asarray(leaves), *each)
        own = np.isin(np.arange(len(runs)), members)
        state = prune_replicas(state, counts, own, numbers, shapes, pruner=pruner, change=change)
    return replace(replicas, state=state)


def _wanted(run: RunState, step: int) -> tuple[Layers, dict[str, np.float32]]:
    """The counts and the schedule's numbers of a run after `step`."""
    schedule, sites = run.plan.pruning, run.state.adapters["sites"]
    assert isinstance(schedule, Schedule)
    numbers = {name: np.float32(number) for name, number in schedule.numbers_at(step).items()}
    return run.plan.pruner.selection.counts(sites, schedule.sparsity_at(step)), numbers


STACKED = Holding(
    prune=_prune,
    states=lambda replicas, runs: unstack(replicas.state, [run.state for run in runs]),
    has_masks=lambda replicas: bool(replicas.state.masks),
)
"""The form for several runs: their states stacked in `Replicas`."""
