"""How good the choice of channels is: the share of the truly largest channels that the estimators find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.calibration.components import record_inputs
from jaxpeft.contextual.choice import estimated_squares, highest, sampled, true_squares
from jaxpeft.contextual.estimators import activation_of, dense_weights, projection_paths
from jaxpeft.models.build import Model
from jaxpeft.pruning.structures import num_kept
from jaxpeft.trees import Layers, Params, leaf_paths

Overlap = dict[int, dict[str, float]]
"""Encoder layer → group (`query_key`, `value`, `feed_forward`) → share of the largest channels that were chosen, 0 to 1."""

_GROUPS = {"query_key": ("query", "key"), "value": ("value",), "feed_forward": ("intermediate",)}


def channel_overlap(
    model: Model,
    params: Params,
    estimators: Layers,
    batch: Mapping[str, Any],
    *,
    layers: Iterable[int],
    sparsity: float = 0.5,
) -> Overlap:
    """Compare the estimated choice of channels with the true one, on one batch, in the base without adapters.

    Args:
        model: the base.
        params: its parameters.
        estimators: those of `make_estimators` for the `layers`.
        batch: token ids and mask, `[rows, length]`.
        layers: encoder layers, by number.
        sparsity: share of the channels that both choices leave out. A choice at random has an overlap of 1 − sparsity.
    """
    numbers = list(layers)
    tokens = {key: jnp.asarray(batch[key]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}

    @jax.jit
    def measure(params: Params, estimators: Layers, tokens: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
        leaves = leaf_paths(params)
        weights = (tokens["attention_mask"] > 0).astype(jnp.float32)
        wanted = [projection_paths(model, number)[name] for number in numbers for name in ("query", "intermediate")]
        inputs = record_inputs(model.module, params, wanted, **model.inputs(tokens))

        def shares(number: int) -> dict[str, jax.Array]:
            paths = projection_paths(model, number)
            return {
                group: _overlap([_scores(model, paths, name, leaves, estimators, inputs, weights) for name in members])
                for group, members in _GROUPS.items()
            }

        def _overlap(scores: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
            estimated, true = (jnp.prod(jnp.stack(kind), axis=0) for kind in zip(*scores, strict=True))
            number_kept = num_kept(true.size, sparsity)
            chosen = jnp.zeros(true.size, bool).at[highest(estimated, number_kept)].set(True)
            return chosen[highest(true, number_kept)].mean()

        return [shares(number) for number in numbers]

    found = jax.device_get(measure(params, estimators, tokens))
    return {
        number: {group: float(share) for group, share in shares.items()}
        for number, shares in zip(numbers, found, strict=True)
    }


def mean_overlap(overlap: Overlap) -> float:
    """The mean over layers and groups."""
    shares = [share for groups in overlap.values() for share in groups.values()]
    return sum(shares) / len(shares)


def _scores(
    model: Model,
    paths: Mapping[str, str],
    name: str,
    leaves: Mapping[str, Any],
    estimators: Layers,
    inputs: Mapping[str, jax.Array],
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The estimated and the true squares of one projection's outputs."""
    path = paths[name]
    kernel, bias = dense_weights(leaves, path)
    x = inputs[paths["intermediate" if name == "intermediate" else "query"]]
    activation = activation_of(model) if name == "intermediate" else None
    estimated = estimated_squares(*sampled(x, weights), estimators[path], kernel, bias, activation)
    return estimated, true_squares(x, weights, kernel, bias, activation)
