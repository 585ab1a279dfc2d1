"""What is minimised and what is counted: masked language modelling, classification, regression.

A loss is a pair (sum, weight) in fp32, so that batches of unequal weight add up exactly and a batch of weight zero is safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.adapters import Method, SiteMethod
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

    @property
    def site_method(self) -> SiteMethod | None:
        """The method, if it has parameters of its own."""
        return self.method if isinstance(self.method, SiteMethod) else None

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the method puts in front of every row; positions and limits of length count without them."""
        return self.site_method.virtual_tokens if self.site_method else 0

    def penalty(self, adapters: Adapters) -> jax.Array | None:
        """What the method adds to the training loss besides the task's, or None."""
        return self.site_method.penalty(adapters["sites"]) if self.site_method else None

    def logits(
        self,
        frozen: Params,
        adapters: Adapters,
        masks: Layers,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Logits in fp32: `[batch, positions, vocabulary]` at the batch's `positions`, or `[batch, num_labels]`.

        What the last layer does behind its attention, and the head, is computed for these tokens alone (a classifier's: the
        first of every row). A masked-lm batch without `positions` is answered at every one of its tokens.
        """
        room = {"virtual_tokens": self.virtual_tokens} if self.virtual_tokens else {}
        take = self._taken(batch)
        place = self.model.behind_attention if take else None
        inputs = self.model.inputs(dict(batch), **room)
        out = apply(
            self.model.module,
            frozen,
            adapters,
            self.site_method,
            masks=masks,
            dropout_rng=dropout_rng,
            taps={place: take} if place and take else None,
            **inputs,
        )
        logits = out.logits
        if logits.ndim == 3 and not place:
            logits = take(logits) if take else logits[:, self.virtual_tokens :]
        return logits.astype(jnp.float32)

    def _taken(self, batch: Batch) -> Callable[[jax.Array], jax.Array] | None:
        """`[batch, seq, d]` → `[batch, p, d]` of the tokens that the head reads; None: all of them."""
        if self.model.task == "classification":
            # Every classifier of transformers' encoders reads the first token, as in PEFT also where it is a virtual one.
            return lambda x: x[:, :1]
        positions = batch.get("positions")
        return None if positions is None else partial(take_positions, positions=positions + self.virtual_tokens)

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
