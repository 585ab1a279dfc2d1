"""The jit-compiled steps: train, evaluate, prune. Frozen weights are an argument, never a closure; the state is donated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxpeft.pruning.allocation import Allocation, Importance, fresh_importance, keep_important, update_importance
from jaxpeft.pruning.masks import apply_masks, tighten
from jaxpeft.pruning.scores import Criterion, magnitude
from jaxpeft.tasks.base import Batch
from jaxpeft.training.dropout import for_drawing
from jaxpeft.training.objective import Objective
from jaxpeft.trees import Adapters, Layers, Params


@struct.dataclass
class TrainState:
    """All that changes in training, and all that a checkpoint holds.

    Attributes:
        micro_step: micro-steps done; a step takes `accumulation_steps` of them.
        adapters: all that trains.
        masks: {} or bool, True = keep.
        opt_state: the optimizer's.
        rng: the run's typed key, from which every micro-step folds its own.
        importance: {} unless ranks are allocated (AdaLoRA).
    """

    micro_step: jax.Array
    adapters: Adapters
    masks: Layers
    opt_state: Any
    rng: jax.Array
    importance: Importance = struct.field(default_factory=dict)


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, Metrics]]


def init_state(
    adapters: Adapters,
    optimizer: optax.GradientTransformation,
    rng: jax.Array,
    *,
    pruned: bool,
    allocated: bool = False,
) -> TrainState:
    """The state before the first step; with `pruned`, masks that keep everything, so that pruning does not recompile.

    With `allocated` (AdaLoRA) the masks are over its triplets alone, and there is the importance that they are chosen by. The state
    holds copies: a step is donated it and consumes it, and `adapters` and `rng` stay the caller's.
    """
    adapters, rng = jax.tree.map(jnp.copy, (adapters, rng))
    masked = {path: {"e": site["e"]} for path, site in adapters["sites"].items()} if allocated else adapters["sites"]
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), masked) if pruned or allocated else {}
    importance = fresh_importance(adapters["sites"]) if allocated else {}
    return TrainState(jnp.zeros((), jnp.int32), adapters, masks, optimizer.init(adapters), rng, importance)


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    traces: Counter | None = None,
    *,
    allocation: Allocation | None = None,
    max_grad_norm: float = 0.0,
) -> TrainStep:
    """Return the jitted `(state, frozen, batch) → (state, {"loss", "grad_norm", "tokens"})`; `state` is donated.

    Args:
        objective: what is minimised. Its method's penalty is part of the loss that is minimised and reported, as in PEFT.
        optimizer: what makes the updates.
        traces: counts one for each batch shape that is compiled, keyed by the shape of `input_ids`.
        allocation: the schedule that the state's importance is kept for, where there is one.
        max_grad_norm: the norm that the optimizer clips to (0: it does not), for the importance is of the clipped gradients.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        count_trace(traces, batch)
        return micro_step(objective, optimizer, state, frozen, batch, allocation, max_grad_norm)

    return jax.jit(train_step, donate_argnums=0)


def micro_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    allocation: Allocation | None = None,
    max_grad_norm: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One micro-step, as `make_train_step` compiles it: loss, gradients of what trains, update."""
    dropout_rng = for_drawing(jax.random.fold_in(state.rng, state.micro_step))

    def mean_loss(adapters: Adapters) -> jax.Array:
        logits = objective.logits(frozen, adapters, state.masks, batch, dropout_rng)
        total, weight = objective.loss(logits, batch)
        loss, penalty = total / jnp.maximum(weight, 1.0), objective.penalty(adapters)
        return loss if penalty is None else loss + penalty

    loss, grads = jax.value_and_grad(mean_loss)(state.adapters)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters, masks=state.masks)
    adapters = optax.apply_updates(state.adapters, updates)
    tokens = (batch["attention_mask"] > 0).sum(dtype=jnp.int32)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "tokens": tokens}
    after = replace(state, micro_step=state.micro_step + 1, adapters=adapters, opt_state=opt_state)
    if allocation is not None:
        after = replace(after, importance=_importance(state, after, grads, allocation, max_grad_norm))
    return after, metrics


def make_train_steps(
    step: TrainStep, assemble: Callable[[Any, Any], Batch]
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return the jitted `(state, frozen, device_data, draws, count) → (state, metrics)`: `count` micro-steps in one program.

    The host is asked for nothing between them, and their temporaries are allocated once for all. `count` is data,
    so that one program serves any number of micro-steps, and each computes what it would have computed alone.

    Args:
        step: as `make_train_step` returns it.
        assemble: `(device_data, draw) → batch`, traced into the program.

    In the returned function `draws` are stacked on a first axis of `count` or more, the rest unused, and so are the metrics.
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
    """The importance after a micro-step: of the parameters after the update, and the gradients that it was made of."""
    step, done = after.micro_step, jnp.asarray(True)
    if isinstance(before.opt_state, optax.MultiStepsState):
        # Micro-steps are averaged: the update is made of their mean, in the last of them.
        n = (before.opt_state.mini_step + 1).astype(jnp.float32)
        grads = jax.tree.map(lambda mean, grad: mean + (grad - mean) / n, before.opt_state.acc_grads, grads)
        step, done = after.opt_state.gradient_step, after.opt_state.mini_step == 0
    if max_grad_norm:
        grads, _ = optax.clip_by_global_norm(max_grad_norm).update(grads, optax.EmptyState())
    updated = update_importance(
        before.importance, after.adapters["sites"], grads["sites"], beta1=allocation.beta1, beta2=allocation.beta2
    )
    # The last allocation is made by what was known before it.
    done &= step < allocation.last_step
    return jax.tree.map(lambda new, old: jnp.where(done, new, old), updated, before.importance)


def make_eval_step(objective: Objective, traces: Counter | None = None) -> Callable[..., tuple[dict, jax.Array | None]]:
    """Return the jitted `(frozen, adapters, masks, batch) → (statistics, outputs)`; what `outputs` are, the task says."""

    def eval_step(frozen: Params, adapters: Adapters, masks: Layers, batch: Batch) -> tuple[dict, jax.Array | None]:
        count_trace(traces, batch)
        logits = objective.logits(frozen, adapters, masks, batch)
        return objective.statistics(logits, batch), objective.task.outputs(logits)

    return jax.jit(eval_step)


@partial(jax.jit, static_argnames="criterion")
def prune_step(state: TrainState, num_keep: Layers, *, criterion: Criterion = magnitude) -> TrainState:
    """Tighten the masks to the `num_keep` entries of every tensor that `criterion` scores highest; set the others to zero."""
    masks = tighten(state.masks, criterion(state.adapters["sites"]), num_keep)
    return replace(
        state, masks=masks, adapters={**state.adapters, "sites": apply_masks(state.adapters["sites"], masks)}
    )


@jax.jit
def allocate_step(state: TrainState, budget: int, last: bool) -> TrainState:
    """Set the singular values of all but the `budget` most important triplets to zero.

    They may grow again, until the `last` allocation: it becomes the masks.
    """
    chosen = keep_important(state.importance, budget)
    masks = jax.tree.map(lambda new, old: jnp.where(last, new, old), chosen, state.masks)
    sites = apply_masks(state.adapters["sites"], chosen)
    return replace(state, masks=masks, adapters={**state.adapters, "sites": sites})


def count_trace(traces: Counter | None, batch: Batch) -> None:
    """Count a program, by its batch's shape: this runs while tracing only, once for each."""
    if traces is not None:
        traces[batch["input_ids"].shape] += 1
