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
from jaxpeft.models.attention import Flash, attention_dropout, module_overrides, position_taps
from jaxpeft.models.build import Model
from jaxpeft.models.last_layer import last_layer
from jaxpeft.trees import Adapters, Layers, Params

Batch = Mapping[str, Any]
"""Arrays of one pass, first axis the batch: token ids and mask, labels, weights; rows or positions of weight 0 do not count."""


@dataclass(frozen=True)
class Objective:
    """A model, the method that adapts it, and its loss.

    `num_labels` is 1 for regression and unused for masked-lm; `flash` None leaves attention to the model.
    """

    model: Model
    method: Method | None
    num_labels: int = 0
    flash: Flash | None = None

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

        The last layer's queries, what follows from them, and the head are computed for these tokens alone (a classifier's: the
        first of every row). A masked-lm batch without `positions` is answered at every one of its tokens; a batch with `segments`
        holds several texts in a row (`jaxpeft.data.packing`), and the answers are its texts'.
        """
        room = {"virtual_tokens": self.virtual_tokens} if self.virtual_tokens else {}
        take = self._taken(batch)
        batch, input_hooks, attention = self._attention(dict(batch), training=dropout_rng is not None)
        taken = False
        if take and not attention and (attention := last_layer(self.model, take)):
            taken = True
        elif take and self.model.behind_attention:
            input_hooks[self.model.behind_attention], taken = take, True
        inputs = self.model.inputs(batch, **room)
        out = apply(
            self.model.module,
            frozen,
            adapters,
            self.site_method,
            masks=masks,
            dropout_rng=dropout_rng,
            input_hooks=input_hooks,
            module_overrides=attention,
            **inputs,
        )
        logits = out.logits
        if logits.ndim == 3 and not taken:
            logits = take(logits) if take else logits[:, self.virtual_tokens :]
        return logits.astype(jnp.float32)

    def _attention(self, batch: dict[str, Any], *, training: bool) -> tuple[dict[str, Any], dict, dict]:
        """The batch, with the segments of packed texts for a mask; and the input hooks and module overrides that it asks for."""
        packed, length = "segments" in batch, batch["input_ids"].shape[1] + self.virtual_tokens
        flash = self.flash if self.flash and length >= self.flash.min_length else None
        if training and flash and attention_dropout(self.model):
            flash = None
        if not packed and not flash:
            return batch, {}, {}
        attention = module_overrides(self.model, flash, packed=packed, training=training)
        if not packed:
            return batch, {}, attention
        return (
            {**batch, "attention_mask": batch["segments"]},
            position_taps(self.model, batch["position_ids"]),
            attention,
        )

    def _taken(self, batch: Batch) -> Callable[[jax.Array], jax.Array] | None:
        """`[batch, seq, d]` → `[batch, p, d]` of the tokens that the head reads; None: all of them."""
        if self.model.task == "classification":
            # Every classifier of transformers' encoders reads the first token, as in PEFT also where it is a virtual one.
            return partial(take_starts, starts=batch["starts"]) if "starts" in batch else lambda x: x[:, :1]
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


def take_starts(x: jax.Array, starts: jax.Array) -> jax.Array:
    """`x: [rows, seq, d]` at the first tokens of packed texts, `starts: [devices, texts / devices]`: `[texts, 1, d]`.

    Each device has its share of the rows and of the texts, and `starts` counts tokens in its share: none is sent.
    """
    shares = x.reshape(len(starts), -1, x.shape[-1])
    return jnp.take_along_axis(shares, starts[..., None], axis=1).reshape(-1, 1, x.shape[-1])
