"""Runs that train together, in one program: their states stacked on a leading axis over one frozen base, and one step over it.

Each member has its own adapter, optimizer state, masks, order of the data and dropout; learning rate, alpha and dropout rate are data,
so that one program serves any of their values. Members of a smaller rank are padded with zeros to the largest, and masked there: a zero
column of A meets a zero row of B, neither has a gradient, and the product is what it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from jaxpeft.pruning.masks import keep_counts
from jaxpeft.pruning.scores import Criterion, magnitude
from jaxpeft.training.input_pipeline import Data, InputPipeline, in_program
from jaxpeft.training.loop import Holding, RunState
from jaxpeft.training.objective import Batch, Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import Metrics, TrainState, allocate_step, count_trace, micro_step, prune_step
from jaxpeft.trees import Params

Settings = Mapping[str, np.ndarray]
"""In what members differ that the program reads: "learning_rate", and "alpha" and "dropout" where they do: `[replicas]` float32."""


@struct.dataclass
class Replicas:
    """The state of runs that train together: every leaf has a first axis `[replicas]`."""

    state: TrainState
    settings: Settings


def stack(states: Sequence[TrainState]) -> TrainState:
    """Stack states on a new first axis.

    Where ranks differ, or one member has masks and another none, all have masks: what is not a member's own is pruned in its.

    Raises:
        InputError: for states of other layers or other methods.
    """
    states = [_with_masks(state) for state in states] if _need_masks(states) else list(states)
    structures: list[Any] = [jax.tree.structure(state) for state in states]
    if any(structure != structures[0] for structure in structures):
        raise InputError(
            "these runs cannot train together: their adapters have other parameters; train them one by one"
        )
    return jax.tree.map(_stack_leaves, *states)


def unstack(stacked: TrainState, like: Sequence[TrainState]) -> list[TrainState]:
    """The members' own states, of the shapes that those in `like` have (arrays or shapes), and without masks where these have none."""
    return [_replica(stacked, i, own) for i, own in enumerate(like)]


def _replica(stacked: TrainState, i: int, own: TrainState) -> TrainState:
    if not own.masks:
        stacked = replace(stacked, masks={})
    return jax.tree.map(lambda leaf, shape: leaf[i][tuple(map(slice, shape.shape))], stacked, own)


def _need_masks(states: Sequence[TrainState]) -> bool:
    shapes = [jax.tree.map(lambda leaf: leaf.shape, state.adapters["sites"]) for state in states]
    return any(state.masks for state in states) or any(shape != shapes[0] for shape in shapes)


def _with_masks(state: TrainState) -> TrainState:
    sites = state.adapters["sites"]
    return replace(state, masks=state.masks or jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), sites))


def _stack_leaves(*leaves: jax.Array) -> jax.Array:
    shapes = [leaf.shape for leaf in leaves]
    if any(shape != shapes[0] for shape in shapes):
        largest = np.max(shapes, axis=0)
        leaves = tuple(
            jnp.pad(leaf, [(0, int(n) - m) for n, m in zip(largest, leaf.shape, strict=True)]) for leaf in leaves
        )
    return jnp.stack(leaves)


def settings_of(methods: Sequence[Method | None], learning_rates: Sequence[float]) -> tuple[Method | None, Settings]:
    """The method that a program of all members is made of, and what it reads of each of them.

    The methods may differ in rank, alpha and dropout alone. The result has the largest rank, and alphas for which its scaling is theirs.
    """
    settings = {"learning_rate": np.asarray(learning_rates, np.float32)}
    method: Any = max(methods, key=lambda each: getattr(each, "rank", 0)) if methods[0] else None
    if method is None:
        return None, settings
    dropouts = [getattr(each, "dropout", 0.0) for each in methods]
    if len(set(dropouts)) > 1:
        # What is drawn is what is kept: 1 minus this must be float32's 1 - rate, to the last bit.
        settings["dropout"] = np.float32(1) - np.asarray([np.float32(1 - rate) for rate in dropouts])
    alphas = [_alpha_at(each, method) for each in methods]
    if len(set(alphas)) > 1:
        settings["alpha"] = np.asarray(alphas, np.float32)
    return method if len(set(alphas)) > 1 or alphas[0] is None else replace(method, alpha=alphas[0]), settings


def _alpha_at(method: Any, padded: Any) -> float | None:
    """The alpha with which the `padded` method, of another rank, scales as `method` does."""
    if getattr(method, "rank", None) == getattr(padded, "rank", None):
        return getattr(method, "alpha", None)
    if not hasattr(method, "alpha"):
        return None
    return padded.alpha * method.scaling / padded.scaling


def with_settings(objective: Objective, settings: Mapping[str, jax.Array]) -> Objective:
    """The objective of one member."""
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
) -> SweepStep:
    """Return the jitted `(members, frozen, batches) → (members, metrics)`; `replicas` are donated.

    Args:
        objective: of `settings_of`'s method.
        make_optimizer: peak learning rate, a traced number → optimizer; the states are of the same chain.
        traces: as in `make_train_step`, keyed by the shape of one member's batch.
        allocation: as there, and the same for all.
        max_grad_norm: as there.
        tokens_side_by_side: members are computed in one `vmap` where the batch of one has at most so many tokens, and else one after the
            other inside the program, which needs the memory of one; None: always in one.

    Batches and metrics have a first axis `[replicas]`; `frozen` has none.
    """

    def one(settings: Any, state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        count_trace(traces, batch)
        optimizer = make_optimizer(settings["learning_rate"])
        return micro_step(
            with_settings(objective, settings), optimizer, state, frozen, batch, allocation, max_grad_norm
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
    """A feed of all members' batches, `[replicas, …]`, from one copy of the data that all of them read in their own order.

    `data` differ in their seed alone.
    """
    first = data[0]

    def draw_at(number: int) -> dict[str, np.ndarray]:
        draws = [each.draw(number) for each in data]
        return {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}

    assemble = jax.vmap(in_program(first, parallel), in_axes=(None, 0))
    return InputPipeline(draw_at, assemble, parallel.replicate(dict(first.device_data)), parallel.replicate)


@partial(jax.jit, static_argnames="criterion")
def prune_replicas(state: TrainState, num_keep: Any, due: jax.Array, *, criterion: Criterion = magnitude) -> TrainState:
    """`prune_step` for the members that are `due`, `[replicas]` bool; `num_keep` has a first axis `[replicas]`."""
    return _where_due(due, jax.vmap(partial(prune_step, criterion=criterion))(state, num_keep), state)


@jax.jit
def allocate_replicas(state: TrainState, budget: jax.Array, last: jax.Array, due: jax.Array) -> TrainState:
    """`allocate_step` for the members that are `due`; all arguments have a first axis `[replicas]`."""
    return _where_due(due, jax.vmap(allocate_step)(state, budget, last), state)


def _where_due(due: jax.Array, after: TrainState, before: TrainState) -> TrainState:
    def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(due.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    adapters, masks = jax.tree.map(chosen, (after.adapters, after.masks), (before.adapters, before.masks))
    return replace(before, adapters=adapters, masks=masks)


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
    num_keep = [
        keep_counts(
            run.state.adapters["sites"],
            0.0 if isinstance(s := run.plan.pruning, Allocation | None) else s.sparsity_at(step),
        )
        for run in runs
    ]
    stacked = jax.tree.map(lambda *counts: jnp.asarray(counts), *num_keep)
    # Runs of different criteria may train together, and each criterion is a program of its own.
    for criterion in dict.fromkeys(run.plan.criterion for run in runs):
        own = due & np.asarray([run.plan.criterion is criterion for run in runs])
        state = prune_replicas(state, stacked, own, criterion=criterion) if own.any() else state
    return replace(replicas, state=state)


STACKED = Holding(prune=_prune, states=lambda replicas, runs: unstack(replicas.state, [run.state for run in runs]))
"""Several runs, whose states are stacked."""
