"""Micro-batches: a batch is computed in several passes, a few rows at a time, and their gradients are added up.

The step is that of the whole batch: losses, weights and gradients are sums over the passes, divided once, and dropout is drawn
for a row by its place in the batch. So the results do not depend on the number of passes, except for the order of sums.
The temporary memory is that of one pass. Contextual sparsity chooses its channels in every pass. A key of jax's `rbg`, which
cannot draw a part of an array, draws by threefry if there are several passes.

A loss that compares the rows of a batch with each other is no such sum. Its gradients are cached (Gao et al. 2021, "Scaling Deep
Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983, section 3): the passes compute the logits of all rows
without gradients; the loss of the whole batch gives its gradients at the logits; and each pass runs again, with these as the
gradients that come from behind. That is one forward pass more. Dropout is the same both times.
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

Logits = Callable[[P, Batch, jax.Array, RowKey | None], jax.Array]
"""`(parameters, batch, key, row_key) → logits` of the batch's rows. `row_key` is given if they are some rows of a larger batch."""

Loss = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]
"""`(logits, batch) →` the sum of the weighted losses and the sum of the weights."""

Penalty = Callable[[P], jax.Array | None]
"""`parameters →` the term that is added to the loss, or None."""


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
    logits: Logits[P],
    loss: Loss,
    penalty: Penalty[P],
    parameters: P,
    batch: Batch,
    key: jax.Array,
    micro_batches: MicroBatches = WHOLE,
    *,
    compares_rows: bool = False,
) -> tuple[jax.Array, P]:
    """The loss that training minimises, the mean over the batch's weights plus the penalty, and its gradients.

    Args:
        logits: computes the rows of one pass.
        loss: the loss of given logits.
        penalty: the term that is added to the loss, or None.
        parameters: a tree of arrays, at which the gradients are taken.
        batch: the batch. Its arrays have rows first; a packed one has texts too (`jaxpeft.data.packing`).
        key: the key of the micro-step.
        micro_batches: the division into passes.
        compares_rows: True if the loss is no sum over rows (`Task.compares_rows`).
    """
    rows = micro_batches.rows_of(*batch["input_ids"].shape)
    if rows.in_pass == rows.in_batch:

        def whole(parameters: P) -> jax.Array:
            mean, more = _mean(loss, logits(parameters, batch, for_drawing(key), None), batch), penalty(parameters)
            return mean if more is None else mean + more

        return jax.value_and_grad(whole)(parameters)

    mean, grads = (_cached if compares_rows else _summed)(logits, loss, parameters, batch, key, rows)
    if penalty(parameters) is None:
        return mean, grads

    def added(parameters: P) -> jax.Array:
        more = penalty(parameters)
        assert more is not None
        return more

    more, more_grads = jax.value_and_grad(added)(parameters)
    return mean + more, jax.tree.map(jnp.add, grads, more_grads)


def _mean(loss: Loss, logits: jax.Array, batch: Batch) -> jax.Array:
    total, weight = loss(logits, batch)
    return total / divisor(weight)


def _numbers(rows: PassRows) -> jax.Array:
    return jnp.arange(-(-rows.in_batch // rows.in_pass), dtype=jnp.int32)


def _summed(
    logits: Logits[P], loss: Loss, parameters: P, batch: Batch, key: jax.Array, rows: PassRows
) -> tuple[jax.Array, P]:
    """The mean loss and its gradients, if the loss is a sum over rows: those of the passes, added up."""

    def add_pass(sums: Any, number: jax.Array) -> tuple[Any, None]:
        part = micro_batch(batch, rows, number)

        def of(parameters: P) -> tuple[jax.Array, jax.Array]:
            return loss(logits(parameters, part, rows.key_of(key, number), rows.row_key), part)

        (total, weight), grads = jax.value_and_grad(of, has_aux=True)(parameters)
        return jax.tree.map(jnp.add, sums, (total, weight, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(jnp.zeros_like, parameters))
    (total, weight, grads), _ = jax.lax.scan(add_pass, start, _numbers(rows))
    weight = divisor(weight)
    return total / weight, jax.tree.map(lambda grad: grad / weight.astype(grad.dtype), grads)


def _cached(
    logits: Logits[P], loss: Loss, parameters: P, batch: Batch, key: jax.Array, rows: PassRows
) -> tuple[jax.Array, P]:
    """The mean loss and its gradients, for any loss: through its gradients at the logits of all rows."""
    # The arrays of the tokens. A row of labels may belong to several rows of tokens.
    tokens = {name: array for name, array in batch.items() if len(array) == len(batch["input_ids"])}

    def of_pass(parameters: P, number: jax.Array) -> jax.Array:
        part = micro_batch(tokens, rows, number)
        return logits(parameters, part, rows.key_of(key, number), rows.row_key)

    _, found = jax.lax.scan(lambda _, number: (None, of_pass(parameters, number)), None, _numbers(rows))
    mean, cotangents = jax.value_and_grad(lambda found: _mean(loss, in_batch_order(found, rows), batch))(found)

    def add_pass(grads: P, of: tuple[jax.Array, jax.Array]) -> tuple[P, None]:
        number, cotangent = of
        _, pull_back = jax.vjp(lambda parameters: of_pass(parameters, number), parameters)
        return jax.tree.map(jnp.add, grads, pull_back(cotangent)[0]), None

    start = jax.tree.map(jnp.zeros_like, parameters)
    return mean, jax.lax.scan(add_pass, start, (_numbers(rows), cotangents))[0]


def in_batch_order(found: jax.Array, rows: PassRows) -> jax.Array:
    """The logits of all passes, `[passes, devices · in_pass, …]`, as those of the batch, without the rows that fill the last pass."""
    by_device = found.reshape(len(found), rows.devices, rows.in_pass, *found.shape[2:]).swapaxes(0, 1)
    own = by_device.reshape(rows.devices, -1, *found.shape[2:])[:, : rows.in_batch]
    return own.reshape(-1, *found.shape[2:])


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
