"""What is minimised and what is counted: masked language modelling, classification, regression.

A loss is a pair (sum, weight) in fp32, so that batches of unequal weight add up exactly and a batch of weight zero is safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.adapters import Method
from jaxpeft.inject import apply
from jaxpeft.models.build import Model
from jaxpeft.paths import Adapters, Layers, Params

Batch = Mapping[str, Any]
"""Arrays of one pass, first axis the batch: token ids and mask, labels, weights; rows or positions of weight 0 do not count."""


@dataclass(frozen=True)
class Objective:
    """A model, the method that adapts it, and its loss. `num_labels` is 1 for regression and unused for masked-lm."""

    model: Model
    method: Method | None
    num_labels: int = 0

    def logits(
        self,
        frozen: Params,
        adapters: Adapters,
        masks: Layers,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Logits in fp32: `[batch, positions, vocabulary]` at the batch's `positions`, or `[batch, num_labels]`."""
        positions: Any = batch.get("positions")
        head = self.model.masked_lm_head if positions is not None else None
        taps = {head: partial(take_positions, positions=positions)} if head else None
        inputs = self.model.inputs(dict(batch))
        out = apply(
            self.model.module, frozen, adapters, self.method, masks=masks, dropout_rng=dropout_rng, taps=taps, **inputs
        )
        if positions is not None and head is None:
            return take_positions(out.logits, positions).astype(jnp.float32)
        return out.logits.astype(jnp.float32)

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Loss of every label, shaped like `batch["labels"]`: cross-entropy in nats, or the squared error of regression."""
        if self.num_labels == 1:
            return jnp.square(logits[..., 0] - batch["labels"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

    def loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum, weight) of the losses."""
        weights = batch["weights"]
        return (self.losses(logits, batch) * weights).sum(), weights.sum()

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Sums over a batch from which metrics are made: `loss`, `weight` and, but for regression, `correct`."""
        total, weight = self.loss(logits, batch)
        sums = {"loss": total, "weight": weight}
        if self.num_labels != 1:
            right = logits.argmax(-1) == batch["labels"]
            sums["correct"] = jnp.where(right, batch["weights"], 0.0).sum()
        return sums


def take_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """`x: [batch, seq, d]` at `positions: [batch, p]`: `[batch, p, d]`."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)
