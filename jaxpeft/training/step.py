"""The jit-compiled steps: train, evaluate, prune, allocate. Frozen weights are an argument, never a closure; the state is donated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxpeft.inject import RowKey
from jaxpeft.pruning.allocation import Allocation, Importance, fresh_importance, keep_important, update_importance
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.pruning.memory import Memory, fresh_memory, gathered, held, sees_pruned
from jaxpeft.pruning.selection import existing_entries
from jaxpeft.pruning.updates import Change, Moment, Pruned, Pruner, tightened
from jaxpeft.tasks.base import Batch
from jaxpeft.training.micro_batches import WHOLE, MicroBatches, mean_loss_and_gradients
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import fresh_moments
from jaxpeft.trees import Adapters, Layers, Params


@struct.dataclass
class TrainState:
    """All arrays that change in training. A checkpoint holds exactly these.

    Attributes:
        micro_step: micro-steps done; a step takes `accumulation_steps` of them.
        adapters: all trained parameters.
        masks: {} or bool, True = keep. If a sparse update is redrawn, they hold its int32 indices (`Method.redrawn`).
        opt_state: the optimizer's state.
        rng: the run's typed key. Every micro-step folds its own key from it.
        memory: what pruning remembers (`jaxpeft.pruning.memory`); {} if its criterion and its schedule need nothing.
    """

    micro_step: jax.Array
    adapters: Adapters
    masks: Layers
    opt_state: Any
    rng: jax.Array
    memory: Memory = struct.field(default_factory=dict)


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def init_state(
    adapters: Adapters,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    *,
    pruned: bool,
    allocated: bool = False,
    remembers: Collection[str] = (),
    redrawn: Layers | None = None,
) -> TrainState:
    """The state before the first step.

    With `pruned` it has masks that keep everything, so that the first pruning does not recompile the step. With `allocated`
    (AdaLoRA) it has masks only for the triplets, and the importance that chooses them. `remembers` names what pruning
    remembers besides (`jaxpeft.pruning.memory`). `redrawn` are the constants of each layer that are redrawn in training, as they are
    at first; they take the place of masks. The state holds copies of all of these, because a step consumes its state (donation),
    and the caller may still need them.
    """
    adapters, rng, redrawn = jax.tree.map(jnp.copy, (adapters, rng, redrawn or {}))
    masked = {path: {"e": site["e"]} for path, site in adapters["sites"].items()} if allocated else adapters["sites"]
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), masked) if pruned or allocated else redrawn
    memory = fresh_importance(adapters["sites"]) if allocated else fresh_memory(remembers, adapters["sites"])
    return TrainState(jnp.zeros((), jnp.int32), adapters, masks, optimizer.init(adapters), rng, memory)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    traces: Counter | None = None,
    *,
    allocation: Allocation | None = None,
    max_grad_norm: float = 0.0,
    micro_batches: MicroBatches = WHOLE,
) -> TrainStep:
    """Return the jitted `(state, frozen, batch) → (state, {"loss", "grad_norm", "tokens"})`; `state` is donated.

    Args:
        objective: the loss to minimise. It includes the method's penalty, and is reported with it, as in PEFT.
        optimizer: the optimizer of the adapters.
        traces: counts the compiled programs by the shape of `input_ids`.
        allocation: AdaLoRA's schedule. If it is given, its importance in the state's memory is updated.
        max_grad_norm: the norm to which the optimizer clips (0: no clipping), because the importance is computed from the clipped
            gradients.
        micro_batches: how many rows a pass computes at a time. Only the dropout of an `rbg` key, and contextual sparsity, depend on it.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        count_trace(traces, batch)
        return micro_step(objective, optimizer, state, frozen, batch, allocation, max_grad_norm, micro_batches)

    return jax.jit(train_step, donate_argnums=0)


def micro_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    allocation: Allocation | None = None,
    max_grad_norm: float = 0.0,
    micro_batches: MicroBatches = WHOLE,
) -> tuple[TrainState, Metrics]:
    """One micro-step, as `make_train_step` compiles it: loss, gradients of the adapters, and the optimizer's update."""
    key = jax.random.fold_in(state.rng, state.micro_step)
    start, masks = _differentiated(state)

    def logits(adapters: Adapters, batch: Batch, key: jax.Array, row_key: RowKey | None) -> jax.Array:
        return objective.logits(frozen, adapters, masks, batch, key, row_key)

    loss, grads = mean_loss_and_gradients(
        logits,
        objective.loss,
        objective.penalty,
        start,
        batch,
        key,
        micro_batches,
        compares_rows=objective.task.compares_rows,
    )
    memory, grads = _remembered(state, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters, masks=held(state.masks, state.memory))
    adapters = optax.apply_updates(state.adapters, updates)
    tokens = (batch["attention_mask"] > 0).sum(dtype=jnp.int32)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": tokens}
    after = replace(state, micro_step=state.micro_step + 1, adapters=adapters, opt_state=opt_state, memory=memory)
    if allocation is not None:
        after = replace(after, memory=_importance(state, after, grads, allocation, max_grad_norm))
    return after, metrics


def _differentiated(state: TrainState) -> tuple[Adapters, Layers]:
    """The adapters at which the loss is differentiated, and the masks that act inside the differentiated function.

    If pruned entries need gradients, the masks act before it: a gradient does not pass through a mask.
    """
    if not sees_pruned(state.memory):
        return state.adapters, state.masks
    return {**state.adapters, "sites": apply_masks(state.adapters["sites"], state.masks)}, {}


def _remembered(state: TrainState, grads: Adapters) -> tuple[Memory, Adapters]:
    """The memory after the gradients `grads`, and the gradients that the optimizer sees: 0 for entries that are held at zero."""
    if not state.memory:
        return {}, grads
    passes = state.opt_state.mini_step if isinstance(state.opt_state, optax.MultiStepsState) else 0
    memory = gathered(state.memory, state.adapters["sites"], grads["sites"], passes)
    if sees_pruned(memory):
        grads = {**grads, "sites": apply_masks(grads["sites"], held(state.masks, memory))}
    return memory, grads


def make_train_steps(
    step: TrainStep, assemble: Callable[[Any, Any], Batch]
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the jitted `(state, frozen, device_data, draws, count) → (state, metrics)`: `count` micro-steps in one program.

    Between micro-steps the program does not wait for the host, and temporary memory is allocated only once. `count` is an
    argument, so that one program serves any number of micro-steps. Each computes the same as in a program of its own.

    In the returned function, `draws` and metrics are stacked on a first axis of `count` or more. Entries from `count` on are
    not used.

    Args:
        step: a step from `make_train_step`.
        assemble: `(device_data, draw) → batch`, traced into the program.
    """

    def train_steps(
        state: TrainState, frozen: Params, device_data: Any, draws: Any, count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        def at(i: jax.Array) -> Batch:
            draw = jax.tree.map(lambda stacked: jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False), draws)
            return assemble(device_data, draw)

        def run(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            state, found = step(state, frozen, at(i))
            return state, jax.tree.map(lambda kept, new: kept.at[i].set(new), metrics, found)

        size = jax.tree.leaves(draws)[0].shape[0]
        shapes = jax.eval_shape(lambda state: step(state, frozen, at(jnp.int32(0)))[1], state)
        metrics = jax.tree.map(lambda shape: jnp.zeros((size, *shape.shape), shape.dtype), shapes)
        return jax.lax.fori_loop(0, count, run, (state, metrics))

    return jax.jit(train_steps, donate_argnums=0)


def _importance(
    before: TrainState, after: TrainState, grads: Adapters, allocation: Allocation, max_grad_norm: float
) -> Importance:
    """The importance after a micro-step, from the parameters after the update and the gradients of that update."""
    step, done = after.micro_step, jnp.asarray(True)
    if isinstance(before.opt_state, optax.MultiStepsState):
        # The last micro-step of a step updates the parameters with the mean gradient of all its micro-steps.
        n = (before.opt_state.mini_step + 1).astype(jnp.float32)
        grads = jax.tree.map(lambda mean, grad: mean + (grad - mean) / n, before.opt_state.acc_grads, grads)
        step, done = after.opt_state.gradient_step, after.opt_state.mini_step == 0
    if max_grad_norm:
        grads, _ = optax.clip_by_global_norm(max_grad_norm).update(grads, optax.EmptyState())
    updated = update_importance(
        before.memory, after.adapters["sites"], grads["sites"], beta1=allocation.beta1, beta2=allocation.beta2
    )
    # The last allocation uses the importance from before its step.
    done &= step < allocation.last_step
    return jax.tree.map(lambda new, old: jnp.where(done, new, old), updated, before.memory)


def make_eval_step(objective: Objective, traces: Counter | None = None) -> Callable[..., tuple[dict, jax.Array | None]]:
    """Return the jitted `(frozen, adapters, masks, batch) → (statistics, outputs)`; see `Task.statistics` and `Task.outputs`."""

    def eval_step(frozen: Params, adapters: Adapters, masks: Layers, batch: Batch) -> tuple[dict, jax.Array | None]:
        count_trace(traces, batch)
        logits = objective.logits(frozen, adapters, masks, batch)
        return objective.statistics(logits, batch), objective.task.outputs(logits)

    return jax.jit(eval_step)


@partial(jax.jit, static_argnames=("pruner", "change"))
def prune_step(
    state: TrainState,
    counts: Layers,
    numbers: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Mapping[str, jax.Array]] | None = None,
    *,
    pruner: Pruner | None = None,
    change: Change = tightened,
) -> TrainState:
    """The state after a change of the masks. By default the masks tighten, and what they prune is set to zero.

    Args:
        state: the state after a step.
        counts: units kept in each scope (`Selection.counts`).
        numbers: numbers that the change reads (`Schedule.numbers_at`).
        shapes: int32 `[dimensions]` for every array at the sites, if the arrays are padded behind these shapes; None: they are not.
        pruner: criterion, units and scopes; None: magnitude, entries, tensors.
        change: what happens (`Schedule.change_at`).
    """
    sites = state.adapters["sites"]
    existing = None if shapes is None else existing_entries(sites, shapes)
    # Of the dtype that the state has, so that no value of it changes its type and the train step is not compiled again.
    given = {name: jnp.asarray(number, jnp.float32) for name, number in (numbers or {}).items()}
    moment = Moment(counts, given, state.rng, existing)
    after = change(Pruned(sites, state.masks, state.memory), moment, pruner or Pruner())
    opt_state = fresh_moments(state.opt_state, after.fresh) if after.fresh else state.opt_state
    adapters = {**state.adapters, "sites": after.sites}
    return replace(state, masks=after.masks, adapters=adapters, memory=after.memory, opt_state=opt_state)


@jax.jit
def allocate_step(state: TrainState, budget: int, last: bool) -> TrainState:
    """Set the singular values of all but the `budget` most important triplets to zero.

    They may grow again until the next allocation. The `last` allocation becomes the masks, so they stay zero.
    """
    chosen = keep_important(state.memory, budget)
    masks = jax.tree.map(lambda new, old: jnp.where(last, new, old), chosen, state.masks)
    sites = apply_masks(state.adapters["sites"], chosen)
    return replace(state, masks=masks, adapters={**state.adapters, "sites": sites})


def count_trace(traces: Counter | None, batch: Batch) -> None:
    """Count a compiled program by the shape of its batch. This code runs only while tracing, which is once per program."""
    if traces is not None:
        traces[batch["input_ids"].shape] += 1
