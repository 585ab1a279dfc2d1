"""An encoder's layers with channels left out: the layer overrides that `jaxpeft.inject.apply` calls.

In each encoder layer there are three choices. Queries and keys share one: a channel that is left out is zero in both, so it adds
nothing to the scores. Values and the attention output share one: the second leaves out the rows of the channels that are
zero. The two feed-forward layers share one, and the activation between them is computed only for the chosen channels. Biases of
the chosen channels, and those of the layers that read them, are kept. A choice is made outside the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters.channels import Channels, spread, take
from jaxpeft.contextual.choice import estimated_squares, highest, sampled, true_squares
from jaxpeft.contextual.estimators import activation_of, dense_weights, projection_paths
from jaxpeft.contextual.settings import ContextualSparsity
from jaxpeft.contextual.tokens import TokensRead
from jaxpeft.inject import LayerOverride
from jaxpeft.models.build import Model
from jaxpeft.pruning.structures import keep_largest, num_kept
from jaxpeft.trees import Layers, Params, leaf_paths

Run = Callable[..., jax.Array]

KeepCounts = Mapping[str, jax.Array]
"""`{"attention", "feed_forward"}` → int32 `[layers]`: how many channels each encoder layer keeps."""


def layer_overrides(
    model: Model,
    settings: ContextualSparsity,
    params: Params,
    estimators: Layers,
    *,
    tokens: jax.Array,
    read: TokensRead | None = None,
    rng: jax.Array | None = None,
    zeroed: KeepCounts | None = None,
) -> dict[str, LayerOverride]:
    """Layer path → the function that computes the layer with channels left out. Layers that leave nothing out are not in it.

    Args:
        model: a model whose family says what its projections are.
        settings: how much each encoder layer leaves out.
        params: the model's parameters in use.
        estimators: those of `make_estimators`, for the selection "svd".
        tokens: `[rows, length]`, above 0 for real tokens.
        read: the tokens that use every channel; None: there are none.
        rng: key of the random selection.
        zeroed: compute every channel, and set all but so many to zero. This gives the same values, saves nothing, and takes the
            counts as traced numbers; the shares in `settings` then only say which layers take part.

    Raises:
        InputError: if the model's family does not say what its projections are.
    """
    leaves = leaf_paths(params)
    overrides: dict[str, LayerOverride] = {}
    for number, shares in enumerate(zip(settings.attention, settings.feed_forward, strict=True)):
        if not any(shares):
            continue
        layer = _EncoderLayer(
            paths=projection_paths(model, number),
            leaves=leaves,
            estimators=estimators,
            selection=settings.selection,
            activation=activation_of(model),
            tokens=tokens,
            read=read if settings.dense_tokens else None,
            rng=None if rng is None else jax.random.fold_in(rng, number),
            zeroed=None if zeroed is None else {group: counts[number] for group, counts in zeroed.items()},
        )
        attention, feed_forward = shares
        if attention:
            overrides |= layer.attention(attention)
        if feed_forward:
            overrides |= layer.feed_forward(feed_forward)
    return overrides


@dataclass
class _EncoderLayer:
    """One encoder layer while it is traced. The model calls its projections in their order, so a choice is made by the first."""

    paths: Mapping[str, str]
    leaves: Mapping[str, Any]
    estimators: Layers
    selection: str
    activation: Callable[[jax.Array], jax.Array]
    tokens: jax.Array
    read: TokensRead | None
    rng: jax.Array | None
    zeroed: Mapping[str, jax.Array] | None
    chosen: dict[str, jax.Array] = field(default_factory=dict)
    intermediate: jax.Array | None = None

    def attention(self, share: float) -> dict[str, LayerOverride]:
        def scores(pair: str) -> LayerOverride:
            def run_outputs(run: Run, x: jax.Array) -> jax.Array:
                if self._all_read(x):
                    return run(x)
                return self._outputs(run, x, self._choice(pair, share, x), self._width(pair))

            return run_outputs

        def attention_output(run: Run, x: jax.Array) -> jax.Array:
            if self._all_read(x):
                return run(x)
            channels = self.chosen["value"]
            others = self._others(x)
            y = run(others * channels) if self.zeroed else run(take(others, channels), Channels(inputs=channels))
            return self._joined(y, lambda read: run(read.take(x)))

        return {
            self.paths["query"]: scores("query"),
            self.paths["key"]: scores("query"),
            self.paths["value"]: scores("value"),
            self.paths["attention_output"]: attention_output,
        }

    def feed_forward(self, share: float) -> dict[str, LayerOverride]:
        def intermediate(run: Run, x: jax.Array) -> jax.Array:
            if self._all_read(x):
                return run(x)
            channels = self._choice("intermediate", share, x)
            self.intermediate = None if self.read is None else run(self.read.take(x))
            others = self._others(x)
            return run(others) if self.zeroed else run(others, Channels(outputs=channels))

        def output(run: Run, h: jax.Array) -> jax.Array:
            if "intermediate" not in self.chosen:  # the layer above had only tokens that stay dense
                return run(h)
            channels = self.chosen["intermediate"]
            y = run(h * channels) if self.zeroed else run(h, Channels(inputs=channels))
            read = self.intermediate
            return self._joined(y, lambda _: run(self.activation(jnp.asarray(read))))

        return {self.paths["intermediate"]: intermediate, self.paths["output"]: output}

    def _outputs(self, run: Run, x: jax.Array, channels: jax.Array, width: int) -> jax.Array:
        others = self._others(x)
        y = run(others) * channels if self.zeroed else spread(run(others, Channels(outputs=channels)), channels, width)
        return self._joined(y, lambda read: run(read.take(x)))

    def _others(self, x: jax.Array) -> jax.Array:
        return x if self.read is None else self.read.others(x)

    def _joined(self, others: jax.Array, dense: Callable[[TokensRead], jax.Array]) -> jax.Array:
        return others if self.read is None else self.read.join(others, dense(self.read))

    def _all_read(self, x: jax.Array) -> bool:
        """True if x has only the tokens that the loss reads, as in the last layer, and these stay dense."""
        return self.read is not None and x.shape[:-1] != self.tokens.shape

    def _width(self, name: str) -> int:
        return self.leaves[f"{self.paths[name]}/kernel"].shape[1]

    def _choice(self, name: str, share: float, x: jax.Array) -> jax.Array:
        """The channels of the group whose first projection is `name`: indices, or if they are zeroed a mask of floats."""
        if name not in self.chosen:
            x = jax.lax.stop_gradient(x)
            scores = jax.lax.stop_gradient(self._scores(name, x))
            if self.zeroed is None:
                self.chosen[name] = highest(scores, num_kept(scores.size, share))
            else:
                group = "feed_forward" if name == "intermediate" else "attention"
                self.chosen[name] = keep_largest(scores, self.zeroed[group]).astype(x.dtype)
        return self.chosen[name]

    def _scores(self, name: str, x: jax.Array) -> jax.Array:
        if self.selection == "random":
            assert self.rng is not None, "a random selection needs a key"
            group = ("query", "value", "intermediate").index(name)
            return jax.random.uniform(jax.random.fold_in(self.rng, group), (self._width(name),))
        # The last layer's queries may be those of some tokens only.
        weights = (self.tokens > 0) if x.shape[:-1] == self.tokens.shape else jnp.ones(x.shape[:-1])
        members = ("query", "key") if name == "query" else (name,)
        scores = [self._squares(member, x, weights.astype(jnp.float32)) for member in members]
        return scores[0] * scores[1] if len(scores) > 1 else scores[0]

    def _squares(self, name: str, x: jax.Array, weights: jax.Array) -> jax.Array:
        path = self.paths[name]
        kernel, bias = dense_weights(self.leaves, path)
        activation = self.activation if name == "intermediate" else None
        if self.selection == "oracle":
            return true_squares(x, weights, kernel, bias, activation)
        return estimated_squares(*sampled(x, weights), self.estimators[path], kernel, bias, activation)
