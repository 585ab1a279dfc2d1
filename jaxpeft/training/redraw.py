"""Redraws the entries of a sparse update in training (`jaxpeft.pruning.redraw` says when): RigL and SET.

The indices are in the state's masks, under the names and paths of the constants whose place they take. So they are an argument of the
compiled step, and come back from a checkpoint. A new entry starts at zero, so taking it up changes no output. Its moments start
anew; Adam's step count goes on, as in `jaxpeft.pruning.rewire`.

RigL needs the gradient of whole frozen kernels. It is computed at a redraw only: of the loss after the step, on that step's batches
and with its dropout. That costs about the time of one step, and for its duration the memory of one fp32 kernel and one gradient for
every adapted layer. On a quantised base it is the gradient with respect to the dequantised kernel.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.shira import SparseDelta
from jaxpeft.inject import RowKey
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.quantization import dequantize, is_quantized
from jaxpeft.tasks.base import Batch
from jaxpeft.training.input_pipeline import InputPipeline
from jaxpeft.training.micro_batches import WHOLE, MicroBatches, mean_loss_and_gradients
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import fresh_moments
from jaxpeft.training.step import TrainState
from jaxpeft.trees import Params, beside_model, join, leaf_paths, without_shared

Redrawing = Callable[[TrainState, int], TrainState]
"""`(state, step) → state`: the state after the redraw that follows `step`."""


def make_redrawing(
    objective: Objective,
    frozen: Params,
    pipeline: InputPipeline,
    schedule: Redraw,
    *,
    accumulation_steps: int,
    micro_batches: MicroBatches = WHOLE,
) -> Redrawing:
    """The redrawing of a run whose state was made with `redrawn=` (`init_state`).

    Args:
        objective: the loss that the run minimises. Channels that contextual sparsity leaves out count here too.
        frozen: the base's parameters.
        pipeline: the source of the run's batches.
        schedule: says which share of the entries moves, and which entries are taken up.
        accumulation_steps: micro-steps per step.
        micro_batches: as in the run's train step.
    """
    method = objective.method
    assert isinstance(method, SparseDelta), "only a sparse update has entries to redraw"
    gradients = pipeline.summed(
        partial(dense_gradients, replace(objective, contextual=None), micro_batches=micro_batches)
    )
    leaves = leaf_paths(without_shared(frozen)[0])

    def redrawn(state: TrainState, step: int) -> TrainState:
        shapes = tuple((path, *leaves[f"{path}/kernel"].shape) for path in sorted(state.masks))
        last = step * accumulation_steps
        by_gradient = schedule.growth == "gradient"
        found = gradients(state, frozen, range(last - accumulation_steps, last)) if by_gradient else None
        share = np.float32(schedule.share_at(step))  # numpy's scalars, because several processes may not pass jax's
        return redraw_step(state, found, share, np.uint32(step), method=method, shapes=shapes)

    return redrawn


def dense_gradients(
    objective: Objective,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    micro_step: jax.Array,
    *,
    micro_batches: MicroBatches = WHOLE,
) -> dict[str, jax.Array]:
    """The gradient of the batch's mean loss with respect to the frozen kernel of every layer that is redrawn.

    Args:
        objective: the loss.
        state: adapters and masks at which the gradient is taken, and the run's key.
        frozen: the base's parameters.
        batch: the batch of `micro_step`.
        micro_step: decides the dropout, which is that of the training step.
        micro_batches: how many rows a pass computes at a time.

    Returns:
        layer path → `[d_in, d_out]` fp32.
    """
    model = without_shared(frozen)[0]
    leaves = leaf_paths(model)
    stored = {path: leaves[f"{path}/kernel"] for path in state.masks}

    kernels = {
        path: dequantize(leaf) if is_quantized(leaf) else leaf.astype(jnp.float32) for path, leaf in stored.items()
    }

    def logits(kernels: dict[str, jax.Array], batch: Batch, key: jax.Array, row_key: RowKey | None) -> jax.Array:
        with_kernels = {
            **join(model, {path: {"kernel": kernel} for path, kernel in kernels.items()}),
            **beside_model(frozen),
        }
        return objective.logits(with_kernels, state.adapters, state.masks, batch, key, row_key)

    key = jax.random.fold_in(state.rng, micro_step)
    return mean_loss_and_gradients(
        logits,
        objective.loss,
        lambda kernels: None,
        kernels,
        batch,
        key,
        micro_batches,
        compares_rows=objective.task.compares_rows,
    )[1]


@partial(jax.jit, static_argnames=("method", "shapes"))
def redraw_step(
    state: TrainState,
    gradients: Mapping[str, jax.Array] | None,
    share: jax.Array | np.float32,
    step: jax.Array | np.uint32,
    *,
    method: SparseDelta,
    shapes: tuple[tuple[str, int, int], ...],
) -> TrainState:
    """The state after the redraw of every layer in its masks.

    Args:
        state: the state after a step.
        gradients: layer path → gradient of the frozen kernel `[d_in, d_out]`, times any factor: the entries with the largest are
            taken up (RigL). None: entries at random (SET).
        share: share of a layer's entries that is given up, from 0 to 1.
        step: the step, uint32. It decides the random entries, with the run's key.
        method: the sparse update.
        shapes: `(layer path, d_in, d_out)` of every layer in the masks.
    """
    # threefry, because rbg draws by the shape, and other devices would draw other entries.
    seed = jax.random.bits(jax.random.fold_in(state.rng, step), dtype=jnp.uint32)
    key = jax.random.key(seed, impl="threefry2x32")
    sites, masks = dict(state.adapters["sites"]), dict(state.masks)
    fresh = {path: {name: jnp.zeros(leaf.shape, bool) for name, leaf in own.items()} for path, own in sites.items()}
    for path, d_in, d_out in shapes:
        if gradients is None:
            scores = jax.random.uniform(jax.random.fold_in(key, zlib.crc32(path.encode())), (d_in, d_out))
        else:
            scores = jnp.abs(gradients[path])
        sites[path], masks[path], fresh[path] = method.at(path).redraw(sites[path], masks[path], scores, share)
    adapters = {**state.adapters, "sites": sites}
    return replace(state, adapters=adapters, masks=masks, opt_state=fresh_moments(state.opt_state, fresh))
