"""The jit-compiled steps: train, evaluate, prune. Frozen weights are an argument, never a closure; the state is donated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxpeft.paths import Adapters, Layers, Params
from jaxpeft.pruning.masks import apply_masks, magnitude_masks
from jaxpeft.training.objectives import Batch, Objective


@struct.dataclass
class TrainState:
    """All that changes in training, and all that a checkpoint holds.

    `step` counts passes (an update takes `accumulation_steps` of them); `masks` is {} or bool, True = keep; `rng` is the
    run's typed key, from which every pass folds its own.
    """

    step: jax.Array
    adapters: Adapters
    masks: Layers
    opt_state: Any
    rng: jax.Array


TrainStep = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


def init_state(
    adapters: Adapters, optimizer: optax.GradientTransformation, rng: jax.Array, *, pruned: bool
) -> TrainState:
    """The state before the first step; with `pruned`, masks that keep everything, so that pruning does not recompile.

    It holds copies: a step is donated its state and consumes it, and `adapters` and `rng` stay the caller's.
    """
    adapters, rng = jax.tree.map(jnp.copy, (adapters, rng))
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), adapters["sites"]) if pruned else {}
    return TrainState(jnp.zeros((), jnp.int32), adapters, masks, optimizer.init(adapters), rng)


def make_train_step(
    objective: Objective, optimizer: optax.GradientTransformationExtraArgs, traces: Counter | None = None
) -> TrainStep:
    """Return the jitted `(state, frozen, batch) → (state, {"loss", "grad_norm"})`; `state` is donated.

    `traces` counts one for each batch shape that is compiled, keyed by the shape of `input_ids`.
    """

    def train_step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        _count(traces, batch)
        dropout_rng = jax.random.fold_in(state.rng, state.step)

        def mean_loss(adapters: Adapters) -> jax.Array:
            logits = objective.logits(frozen, adapters, state.masks, batch, dropout_rng)
            total, weight = objective.loss(logits, batch)
            return total / jnp.maximum(weight, 1.0)

        loss, grads = jax.value_and_grad(mean_loss)(state.adapters)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.adapters, masks=state.masks)
        adapters = optax.apply_updates(state.adapters, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return replace(state, step=state.step + 1, adapters=adapters, opt_state=opt_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(objective: Objective, traces: Counter | None = None) -> Callable[..., tuple[dict, jax.Array]]:
    """Return the jitted `(frozen, adapters, masks, batch) → (statistics, logits)`."""

    def eval_step(frozen: Params, adapters: Adapters, masks: Layers, batch: Batch) -> tuple[dict, jax.Array]:
        _count(traces, batch)
        logits = objective.logits(frozen, adapters, masks, batch)
        # A vocabulary's logits are not worth carrying to the host; a classifier's are the prediction.
        return objective.statistics(logits, batch), logits if logits.ndim == 2 else jnp.zeros(())

    return jax.jit(eval_step)


@jax.jit
def prune_step(state: TrainState, num_keep: Layers) -> TrainState:
    """Tighten the masks to the `num_keep` largest entries of every tensor, and set what they prune to zero."""
    masks = magnitude_masks(state.adapters["sites"], state.masks, num_keep)
    return replace(
        state, masks=masks, adapters={**state.adapters, "sites": apply_masks(state.adapters["sites"], masks)}
    )


def _count(traces: Counter | None, batch: Batch) -> None:
    # Runs while tracing only: once for each program.
    if traces is not None:
        traces[batch["input_ids"].shape] += 1
