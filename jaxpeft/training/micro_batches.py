"""Micro-batches: a batch is computed in several passes, a few rows at a time, and their gradients are added up.

The step is that of the whole batch: losses, weights and gradients are sums over the passes, divided once, and dropout is drawn
for a row by its place in the batch. So the results do not depend on the number of passes, except for the order of sums.
The temporary memory is that of one pass. Contextual sparsity chooses its channels in every pass. A key of jax's `rbg`, which
cannot draw a part of an array, draws by threefry if there are several passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxpeft.data.packing import PER_TEXT
from jaxpeft.inject import RowKey
from jaxpeft.tasks.base import Batch
from jaxpeft.training.dropout import PassRows, for_drawing

P = TypeVar("P")

Totals = Callable[[P, Batch, jax.Array, RowKey | None], tuple[jax.Array, jax.Array]]
"""`(parameters, batch, key, row_key) →` the sum of the weighted losses and the sum of the weights."""


@dataclass(frozen=True)
class MicroBatches:
    """The division of batches into micro-batches. A row is never divided.

    Attributes:
        rows: rows of a micro-batch, over all devices together; None: no limit.
        tokens: most tokens of a micro-batch, over all devices together, so that short rows share a pass with more others; None: no limit.
        devices: number of devices that share a batch.
        virtual_tokens: tokens that prompt tuning puts in front of every row.
    """

    rows: int | None = None
    tokens: int | None = None
    devices: int = 1
    virtual_tokens: int = 0

    def rows_of(self, rows: int, length: int) -> PassRows:
        """The rows of a pass, for batches of `rows` rows (over all devices) of `length` tokens.

        All passes of a batch have the same number of rows, except that the last may have fewer.
        """
        own = most = rows // self.devices
        if self.rows:
            most = min(most, self.rows // self.devices)
        if self.tokens:
            most = min(most, self.tokens // ((length + self.virtual_tokens) * self.devices))
        passes = -(-own // max(most, 1))
        return PassRows(-(-own // passes), own, self.devices)


def fewest_passes(needed_bytes: Callable[[int], int | None], rows: int, *, first: int, limit_bytes: int) -> int:
    """The fewest passes, a power of two, whose program needs at most `limit_bytes`; one row a pass if none does.

    Twice the passes need at least half of the memory. If `first` fits, half the passes are assumed to need twice the memory.

    Args:
        needed_bytes: passes → bytes that the compiled program needs; None if the compiler finds no room for it.
        rows: rows of a batch on each device.
        first: passes to try first. A good guess saves a compilation.
        limit_bytes: the memory that there is.
    """
    most, passes, too_few = 1 << (rows - 1).bit_length(), first, 0
    while True:
        needed = needed_bytes(passes)
        if needed is not None and needed <= limit_bytes:
            if passes <= max(2 * too_few, 1) or 2 * needed > limit_bytes:
                return passes
            fewer = passes // 2  # as few as are sure to fit
            while fewer > max(2 * too_few, 1) and needed * passes <= limit_bytes * (fewer // 2):
                fewer //= 2
            passes = fewer
        elif passes >= most:
            return most
        else:
            too_few, more = passes, 2 * passes  # more than are sure not to fit
            while needed is not None and more < most and needed * passes > limit_bytes * more:
                too_few, more = more, 2 * more
            passes = more


WHOLE = MicroBatches()
"""Every batch is one pass."""


def mean_loss_and_gradients(
    totals: Totals[P],
    penalty: Callable[[P], jax.Array | None],
    parameters: P,
    batch: Batch,
    key: jax.Array,
    micro_batches: MicroBatches = WHOLE,
) -> tuple[jax.Array, P]:
    """The loss that training minimises, the mean over the batch's weights plus the penalty, and its gradients.

    Args:
        totals: computes the rows of one pass.
        penalty: the term that is added to the loss, or None.
        parameters: a tree of arrays, at which the gradients are taken.
        batch: the batch. Its arrays have rows first; a packed one has texts too (`jaxpeft.data.packing`).
        key: the key of the micro-step.
        micro_batches: the division into passes.
    """
    rows = micro_batches.rows_of(*batch["input_ids"].shape)
    if rows.in_pass == rows.in_batch:

        def mean(parameters: P) -> jax.Array:
            total, weight = totals(parameters, batch, for_drawing(key), None)
            loss, more = total / divisor(weight), penalty(parameters)
            return loss if more is None else loss + more

        return jax.value_and_grad(mean)(parameters)

    def add_pass(sums: Any, number: jax.Array) -> tuple[Any, None]:
        def of(parameters: P) -> tuple[jax.Array, jax.Array]:
            return totals(parameters, micro_batch(batch, rows, number), rows.key_of(key, number), rows.row_key)

        (total, weight), grads = jax.value_and_grad(of, has_aux=True)(parameters)
        return jax.tree.map(jnp.add, sums, (total, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    passes = jnp.arange(-(-rows.in_batch // rows.in_pass), dtype=jnp.int32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, parameters))
    (total, weight, grads), _ = jax.lax.scan(add_pass, start, passes)
    weight = divisor(weight)
    loss, grads = total / weight, jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)
    if penalty(parameters) is None:
        return loss, grads

    def added(parameters: P) -> jax.Array:
        more = penalty(parameters)
        assert more is not None
        return more

    more, more_grads = jax.value_and_grad(added)(parameters)
    return loss + more, jax.tree.map(jnp.add, grads, more_grads)


def divisor(weight: jax.Array) -> jax.Array:
    """`weight`, a sum of weights, as a divisor: 1 if it is 0, as it is for a batch of which nothing counts. It may be below 1."""
    return jnp.where(weight > 0, weight, jnp.ones_like(weight))


def micro_batch(batch: Batch, rows: PassRows, number: jax.Array) -> dict[str, Any]:
    """The rows of pass `number`: on every device the next ones. Behind the end the last row repeats, without weight.

    A packed batch keeps its arrays of texts whole. Texts in other rows have the weight 0 and start anywhere.
    """
    missing = -rows.in_batch % rows.in_pass
    packed = "starts" in batch

    def taken(name: str, array: jax.Array) -> jax.Array:
        own = array.reshape(rows.devices, rows.in_batch, *array.shape[1:])
        # Not empty rows: there are attention kernels that divide by the length of a row.
        mode = "constant" if name == "weights" else "edge"
        own = jnp.pad(own, [(0, 0), (0, missing), *[(0, 0)] * (own.ndim - 2)], mode)
        own = jax.lax.dynamic_slice_in_dim(own, number * rows.in_pass, rows.in_pass, axis=1)
        return own.reshape(-1, *array.shape[1:])

    part = {name: array if packed and name in PER_TEXT else taken(name, array) for name, array in batch.items()}
    if packed:
        tokens = rows.in_pass * batch["input_ids"].shape[1]
        starts = batch["starts"] - number * tokens
        inside = (starts >= 0) & (starts < tokens)
        part |= {
            "starts": jnp.clip(starts, 0, tokens - 1),
            "weights": jnp.where(inside.reshape(-1), batch["weights"], 0.0),
        }
    return part
