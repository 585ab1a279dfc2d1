"""Joins a model, an adapter method and a task: from a batch to logits, loss and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters import Method, SiteMethod
from jaxpeft.contextual import ContextualSparsity
from jaxpeft.contextual.layers import layer_overrides
from jaxpeft.contextual.tokens import Leading, Places, TokensRead, move_read_tokens
from jaxpeft.inject import LayerOverride, RowKey, apply
from jaxpeft.models.activation import activation_overrides
from jaxpeft.models.attention import Flash, attention_dropout, module_overrides, position_taps, takes_positions
from jaxpeft.models.build import Model
from jaxpeft.models.dense_attention import CPU_PARTS
from jaxpeft.models.last_layer import last_layer
from jaxpeft.tasks.base import Batch, Task
from jaxpeft.trees import ESTIMATORS, Adapters, Layers, Params, join, without_shared

_CHANNELS = 0x5BA125E  # folded into the key of a micro-step for the random choice of channels, so that dropout draws as without it


@dataclass(frozen=True)
class Objective:
    """The loss to minimise, and the statistics to count.

    Attributes:
        model: the base.
        method: the adapter method; None: nothing is adapted.
        task: the task.
        flash: flash attention; None: the model's own attention.
        contextual: channels of the base that a training step leaves out; None: none. Evaluation is always dense.
        on_cpu: True: attention and GELU are computed in the forms that are fast on a CPU, if the model's family is known. The
            results are the same, except for rounding.
    """

    model: Model
    method: Method | None
    task: Task
    flash: Flash | None = None
    contextual: ContextualSparsity | None = None
    on_cpu: bool = False

    @property
    def site_method(self) -> SiteMethod | None:
        """The method if it has parameters of its own, else None."""
        return self.method if isinstance(self.method, SiteMethod) else None

    @property
    def virtual_tokens(self) -> int:
        """The number of tokens that the method puts in front of every row. Positions and limits of length do not count them."""
        return self.site_method.virtual_tokens if self.site_method else 0

    def penalty(self, adapters: Adapters) -> jax.Array | None:
        """The term that the method adds to the training loss, or None."""
        return self.site_method.penalty(adapters["sites"]) if self.site_method else None

    def logits(
        self,
        frozen: Params,
        adapters: Adapters,
        masks: Layers,
        batch: Batch,
        dropout_rng: jax.Array | None = None,
        row_key: RowKey | None = None,
    ) -> jax.Array:
        """Logits in fp32, such as `[batch, positions, vocabulary]` at the batch's `positions`, or `[batch, num_labels]`.

        They are the head's outputs, or what the task makes of them (`Task.read_out`), such as embeddings `[batch, d]`.

        The queries of the last layer, all that follows from them, and the head are computed only for these tokens (in a
        classifier: the first token of every row). A masked-lm batch without `positions` has logits at all of its tokens. A batch
        with `segments` holds several texts per row (`jaxpeft.data.packing`), and has logits for each text.
        """
        room = {"virtual_tokens": self.virtual_tokens} if self.virtual_tokens else {}
        contextual = None if dropout_rng is None else self.contextual
        batch, read = self._read_tokens(batch, contextual)
        take = self.task.tokens_read(batch, self.virtual_tokens)
        batch, overrides, whole = self._overrides(dict(batch), row_key, training=dropout_rng is not None)
        input_hooks = position_taps(self.model, batch["position_ids"]) if "position_ids" in batch else {}
        taken = False
        if take and not whole and (of_some := last_layer(self.model, take)):
            overrides, taken = overrides | of_some, True
        elif take and self.model.behind_attention:
            input_hooks[self.model.behind_attention], taken = take, True
        inputs = self.model.inputs(batch, **room)
        left_out: dict[str, LayerOverride] = {}
        if contextual and dropout_rng is not None:
            left_out = layer_overrides(
                self.model,
                contextual,
                join(without_shared(frozen)[0], adapters["modules"]),
                frozen.get(ESTIMATORS, {}),
                tokens=inputs["attention_mask"],
                read=read,
                rng=jax.random.fold_in(dropout_rng, _CHANNELS),
            )
        out = apply(
            self.model.module,
            frozen,
            adapters,
            self.site_method,
            masks=masks,
            dropout_rng=dropout_rng,
            row_key=row_key,
            input_hooks=input_hooks,
            module_overrides=overrides,
            layer_overrides=left_out,
            **inputs,
        )
        outputs = self.model.head.logits(out).astype(jnp.float32)
        if outputs.ndim == 3 and take and not taken:
            outputs = take(outputs)
        of_all_tokens = outputs.ndim == 3 and not take
        return self.task.read_out(outputs, batch, self.virtual_tokens if of_all_tokens else 0)

    def _read_tokens(self, batch: Batch, contextual: ContextualSparsity | None) -> tuple[Batch, TokensRead | None]:
        """The batch in an order in which the tokens that the loss reads can be kept apart, and where they are."""
        places = self.task.places_read(batch, self.virtual_tokens)
        if contextual is None or not contextual.dense_tokens or places is None:
            return batch, None
        if "segments" in batch or self.virtual_tokens or not takes_positions(self.model):
            return batch, Places(places)
        moved, places = move_read_tokens(batch, places)
        return ({**moved, "positions": places} if "positions" in batch else moved), Leading(places.shape[1])

    def _overrides(
        self, batch: dict[str, Any], row_key: RowKey | None, *, training: bool
    ) -> tuple[dict[str, Any], dict, bool]:
        """The batch, whose mask is the segments if texts are packed; the module overrides; True if attention needs all queries."""
        packed, length = "segments" in batch, batch["input_ids"].shape[1] + self.virtual_tokens
        flash = self.flash if self.flash and length >= self.flash.min_length else None
        if training and flash and attention_dropout(self.model):
            flash = None
        overrides = activation_overrides(self.model) if self.on_cpu else {}
        if packed or flash or (self.on_cpu and self.model.family.attention):
            parts = CPU_PARTS if self.on_cpu else 1
            overrides |= module_overrides(
                self.model, flash, packed=packed, training=training, row_key=row_key, parts=parts
            )
        batch = {**batch, "attention_mask": batch["segments"]} if packed else batch
        return batch, overrides, packed or flash is not None

    def loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The sum of the weighted losses and the sum of the weights, in fp32, that training minimises (`Task.training_loss`)."""
        return self.task.training_loss(logits, batch)

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Sums over a batch from which metrics are computed (`Task.statistics`)."""
        return self.task.statistics(logits, batch)
