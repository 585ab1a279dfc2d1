"""How much each encoder layer may leave out: a sweep over layers, and a proposal that spends a budget of operations well.

One layer at a time, and one of its two groups of channels, is made sparse; the error is the change of the model's outputs (Khaki et
al. 2025, section 4.3, which measures a task's accuracy instead). No label is needed and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.contextual.estimators import projection_paths
from jaxpeft.contextual.layers import layer_overrides
from jaxpeft.contextual.settings import ContextualSparsity
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.models.build import Model
from jaxpeft.pruning.structures import num_kept
from jaxpeft.trees import Layers, Params

LEVELS = (0.5, 0.75, 0.9, 0.95)
"""Sparsities that the sweep tries, ascending."""

GROUPS = ("attention", "feed_forward")


@dataclass(frozen=True)
class Sensitivity:
    """The result of a sweep.

    Attributes:
        levels: the sparsities, ascending.
        errors: group → `[layers, levels]`: ‖change of the logits‖ / ‖logits‖ over all real tokens, each token's mean taken off.
    """

    levels: tuple[float, ...]
    errors: Mapping[str, np.ndarray]


def measure_sensitivity(
    model: Model,
    params: Params,
    estimators: Layers,
    batches: Sequence[Mapping[str, Any]],
    *,
    levels: Sequence[float] = LEVELS,
) -> Sensitivity:
    """Sweep over all encoder layers of `model`, with one compiled program.

    Args:
        model: a model with a masked-LM head.
        params: its parameters.
        estimators: those of all encoder layers.
        batches: token ids and mask, `[rows, length]`; all of one shape.
        levels: sparsities to try, each above 0 and below 1.
    """
    config = model.config
    number = config.num_hidden_layers
    widths = {"attention": config.hidden_size, "feed_forward": feed_forward_width(model)}
    # Any share above 0 makes the layers take part: how much is left out is an argument of the program.
    settings = ContextualSparsity((0.5,) * number, (0.5,) * number, dense_tokens=False)

    @jax.jit
    def logits(params: Params, batch: dict[str, jax.Array], keep: dict[str, jax.Array]) -> jax.Array:
        inputs = model.inputs(batch)
        overrides = layer_overrides(model, settings, params, estimators, tokens=inputs["attention_mask"], zeroed=keep)
        out = apply(model.module, params, {"sites": {}, "modules": {}}, layer_overrides=overrides, **inputs)
        centred = out.logits.astype(jnp.float32)
        centred = centred - centred.mean(-1, keepdims=True)
        return jnp.where((batch["attention_mask"] > 0)[..., None], centred, 0.0)

    @jax.jit
    def squares(params: Params, batch: dict[str, jax.Array], keep: dict[str, jax.Array], dense: jax.Array) -> jax.Array:
        return jnp.square(logits(params, batch, keep) - dense).sum()

    whole = {group: np.full(number, width, np.int32) for group, width in widths.items()}
    totals = {group: np.zeros((number, len(levels))) for group in GROUPS}
    size = 0.0
    for given in batches:
        batch = {
            key: jnp.asarray(given[key]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in given
        }
        dense = logits(params, batch, whole)
        size += float(jnp.square(dense).sum())
        for group in GROUPS:
            for layer in range(number):
                for i, level in enumerate(levels):
                    counts = whole[group].copy()
                    counts[layer] = num_kept(widths[group], level)
                    totals[group][layer, i] += float(squares(params, batch, {**whole, group: counts}, dense))
    return Sensitivity(tuple(levels), {group: np.sqrt(total / size) for group, total in totals.items()})


def feed_forward_width(model: Model) -> int:
    """Channels between the two feed-forward layers."""
    return model.sites()[projection_paths(model, 0)["intermediate"]].d_out


def check_reachable(operations: float, levels: Sequence[float] = LEVELS) -> None:
    """Raise InputError if the highest of `levels` everywhere leaves more than a share `operations`. Needs no sweep."""
    least = 1 - levels[-1]
    if operations < least:
        raise InputError(
            f"a share of {operations:g} of the operations cannot be reached: leaving {levels[-1]:g} out everywhere keeps {least:g}"
        )


def propose(found: Sensitivity, model: Model, *, operations: float) -> ContextualSparsity:
    """The sparsities that keep a share `operations` of the layers' multiplications, with the least error.

    Starting from a dense model, it raises the layer and group that costs the least error for the multiplications that it saves, by one
    level, until enough are saved. Errors of different layers are taken to be independent, so their squares add up.

    Args:
        found: the sweep.
        model: the model of the sweep.
        operations: share of the multiplications in the encoder's linear layers that is left, above 0 and at most 1.

    Raises:
        InputError: even the highest levels leave more.
    """
    check_reachable(operations, found.levels)
    number, d = model.config.num_hidden_layers, model.config.hidden_size
    costs = {"attention": 4.0 * d * d, "feed_forward": 2.0 * d * feed_forward_width(model)}
    levels, total = (0.0, *found.levels), number * sum(costs.values())
    squares = {group: np.square(np.pad(errors, ((0, 0), (1, 0)))) for group, errors in found.errors.items()}
    at = {group: [0] * number for group in GROUPS}
    left = total
    while left > operations * total * (1 + 1e-9):
        options = []
        for group in GROUPS:
            for layer, i in enumerate(at[group]):
                if i + 1 < len(levels):
                    saved = costs[group] * (levels[i + 1] - levels[i])
                    error = max(squares[group][layer, i + 1] - squares[group][layer, i], 0.0)
                    options.append((error / saved, group, layer, saved))
        _, group, layer, saved = min(options)
        at[group][layer] += 1
        left -= saved
    shares = {group: tuple(levels[i] for i in at[group]) for group in GROUPS}
    return ContextualSparsity(shares["feed_forward"], shares["attention"])
