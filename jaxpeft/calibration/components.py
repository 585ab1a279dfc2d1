"""EVA's initialisation: principal components of the inputs of adapted layers, and the ranks of the layers.

Paischer et al. 2024, arXiv 2410.07170, section 3 and algorithm 1; PEFT's `get_eva_state_dict`. Layers with the same
input (query, key, value) share one decomposition. The components of all layers compete for the ranks: those that explain
the largest share of their layer's variance win. The sum of the ranks stays the same. A layer gets at most rho times its
own rank, and some layers get none.

Differs from PEFT: with `whiten` every layer's components are divided once by the roots of their singular values. PEFT
divides in place, and so repeats it for each further layer with the same input.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.adapters import Lora, Site
from jaxpeft.adapters.lora_init import full_options
from jaxpeft.calibration.incremental_pca import Fit, updated
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.models.build import Model
from jaxpeft.trees import Params

_MAX_PASSES = 100


@dataclass(frozen=True)
class Components:
    """EVA's initial values.

    Attributes:
        method: the method, with the new ranks and alphas as `rank_pattern` and `alpha_pattern`.
        targets: the adapted layers, without those of rank 0.
        components: A `[d_in, rank]` by linear layer.
    """

    method: Lora
    targets: dict[str, Site]
    components: dict[str, jax.Array]


def input_components(
    model: Model, method: Lora, targets: Mapping[str, Site], batches: Collection[Mapping[str, Any]]
) -> Components:
    """Run the frozen `model` over `batches` repeatedly until the components converge, then distribute the ranks.

    A token counts if `attention_mask` covers it and its row has some weight. With `use_label_mask` it also needs a label:
    it is at one of the batch's `positions` or, for batches with one label per token, its label is not
    `label_mask_value`. A layer whose input has rows instead of tokens (a pooler) counts the rows with at least one such
    token. As in PEFT, embeddings are initialised as without EVA.

    Args:
        model: the base, run without dropout.
        method: LoRA with `eva_config`. A component has converged if its cosine with its last value is at least tau.
            rho limits a layer's rank, as above.
        targets: the layers to adapt, by path.
        batches: batches as `jaxpeft.data` makes them. A layer skips a batch with fewer tokens than components.

    Raises:
        InputError: there are no batches, rho times the rank exceeds a layer's width, every batch is too small, or the
            components do not converge.
    """
    options = full_options("eva_config", method.eva_config)
    linear = [path for path, site in targets.items() if site.kind == "linear"]
    if not len(batches):
        raise InputError("EVA needs at least one batch, got none; set adapter.calibration_batches")
    budget = sum(method.at(path).rank for path in linear)
    most = {path: _max_components(method.at(path).rank, options["rho"], targets[path]) for path in linear}
    see = _recorder(model, linear)
    first = next(iter(batches))
    leaders = _leaders(see(first, _counted(first, options)))
    # The shared decomposition must have enough components for each of its layers.
    for path, leader in leaders.items():
        most[leader] = max(most[leader], most[path])
    most = {path: most[leaders[path]] for path in most}

    fits: dict[str, Fit] = {}
    ranks = dict(most)
    for i, batch in enumerate(itertools.cycle(batches)):
        # Only components within the present ranks have to converge.
        moving = [
            p for p in leaders.values() if p not in fits or (fits[p].similarity[: ranks[p]] < options["tau"]).any()
        ]
        if not moving:
            break
        _check_progress(i, len(batches), leaders.values(), fits, most, moving)
        inputs = see(batch, _counted(batch, options))
        for path in dict.fromkeys(moving):
            if len(rows := inputs[path]) >= most[path]:  # fewer rows have fewer components
                fits[path] = updated(fits.get(path), rows, most[path])
        if fits.keys() == set(leaders.values()):
            ranks = _distribute_ranks(fits, leaders, budget, most)
    components = {
        path: _initial_a(fits[leaders[path]], rank, options["whiten"]) for path, rank in ranks.items() if rank
    }
    kept = {path: site for path, site in targets.items() if ranks.get(path) != 0}
    return Components(_with_ranks(method, kept, ranks, options["adjust_scaling_factors"]), kept, components)


def record_inputs(module: nn.Module, params: Params, layers: Iterable[str], **inputs: Any) -> dict[str, jax.Array]:
    """Run `module` without dropout and return the first argument of each of the `layers`, such as x: `[batch, seq, d_in]`.

    Pure, for use inside `jax.jit`. Kernels may be quantised. Gradient checkpointing is switched off for the run.
    """
    if getattr(module, "gradient_checkpointing", False):
        module = module.clone(gradient_checkpointing=False)  # checkpointed layers would not let the inputs out
    seen: dict[str, jax.Array] = {}

    def tap(path: str) -> Callable[[jax.Array], jax.Array]:
        def keep(x: jax.Array) -> jax.Array:
            seen[path] = x
            return x

        return keep

    apply(module, params, {"sites": {}, "modules": {}}, input_hooks={path: tap(path) for path in layers}, **inputs)
    return seen


def _recorder(model: Model, layers: list[str]) -> Callable[[Mapping[str, Any], np.ndarray], dict[str, np.ndarray]]:
    """A function `(batch, counted) → layer → rows [n, d_in]` in float32, on the host."""

    @jax.jit
    def record(params: Params, batch: dict[str, Any]) -> dict[str, jax.Array]:
        return record_inputs(model.module, params, layers, **model.inputs(batch))

    def see(batch: Mapping[str, Any], counted: np.ndarray) -> dict[str, np.ndarray]:
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        found = record(model.params, tokens)
        # Restore the order of the layers, which jit does not keep.
        return {path: _rows(np.asarray(found[path].astype(jnp.float32)), counted) for path in layers}

    return see


def _rows(x: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return x[counted] if x.ndim > 2 else x[counted.any(axis=1)]  # a pooler's input has no token axis


def _counted(batch: Mapping[str, Any], options: Mapping[str, Any]) -> np.ndarray:
    """True if a token counts, `[batch, seq]` bool."""
    counted = np.asarray(batch["attention_mask"]).astype(bool)
    positions, labels = batch.get("positions"), batch.get("labels")
    weights = np.asarray(batch.get("weights", np.ones(counted.shape[:1] if positions is None else np.shape(positions))))
    # Weights are per row or, for masked-lm, per position: a row counts if any of its weights is positive.
    counted = counted & (weights > 0).reshape(len(weights), -1).any(axis=1, keepdims=True)
    if not options["use_label_mask"]:
        return counted
    if positions is not None:
        labelled = np.zeros_like(counted)
        labelled[np.nonzero(weights)[0], np.asarray(positions)[np.nonzero(weights)]] = True
        return counted & labelled
    if labels is not None and np.shape(labels) == counted.shape:
        return counted & (np.asarray(labels) != options["label_mask_value"])
    return counted


def _max_components(rank: int, rho: float, site: Site) -> int:
    """The maximum number of components of a layer."""
    most, width = round(rank * rho), min(site.d_in, site.d_out)
    if most > width:
        raise InputError(
            f"EVA may give layer {site.path} rho·rank = {rho:g}·{rank} components, but its width is {width}: lower eva_config.rho or "
            "adapter.rank"
        )
    return most


def _leaders(inputs: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Layer → the first layer with the same input. As in PEFT, layers that are their own leader come first."""
    firsts: dict[bytes, str] = {}
    leaders = {path: firsts.setdefault(rows.tobytes(), path) for path, rows in inputs.items()}
    return dict(sorted(leaders.items(), key=lambda item: item[0] != item[1]))


def _check_progress(
    step: int,
    num_batches: int,
    leaders: Iterable[str],
    fits: Mapping[str, Fit],
    most: Mapping[str, int],
    moving: list[str],
) -> None:
    """Raise InputError if the components will not converge on these batches, so that the loop would never end."""
    for path in leaders if step >= num_batches else ():
        if path not in fits:
            raise InputError(
                f"no batch has the {most[path]} tokens that layer {path} needs for as many components: give larger batches, or set "
                "eva_config.use_label_mask to false"
            )
    if step >= _MAX_PASSES * num_batches:
        raise InputError(
            f"the components of layer {moving[0]} have not converged after {_MAX_PASSES} passes over {num_batches} batches: give more "
            "batches, or lower eva_config.tau"
        )


def _distribute_ranks(
    fits: Mapping[str, Fit], leaders: Mapping[str, str], budget: int, most: Mapping[str, int]
) -> dict[str, int]:
    """The rank of each layer: its share of the `budget` components that explain the most variance."""
    shares = [(share, path) for path, leader in leaders.items() for share in fits[leader].explained[: most[leader]]]
    strongest = sorted(shares, key=lambda pair: -pair[0])[:budget]
    counts = Counter(path for _, path in strongest)
    ranks = {path: counts[path] for path in leaders}
    for path, leader in leaders.items():
        # Components of layers with the same input tie. The leader gets the most, since only its convergence is checked.
        if ranks[leader] < ranks[path]:
            ranks[leader], ranks[path] = ranks[path], ranks[leader]
    return ranks


def _initial_a(fit: Fit, rank: int, whiten: bool) -> jax.Array:
    """LoRA's initial A, `[d_in, rank]`."""
    components = fit.components[:rank]
    if whiten:
        components = components / np.sqrt(fit.singular_values[:rank, None])
    return jnp.asarray(components.T)


def _with_ranks(method: Lora, targets: Iterable[str], ranks: Mapping[str, int], adjust: bool) -> Lora:
    """`method` with a pattern for every layer whose rank or alpha differs from the method's."""
    rank_pattern, alpha_pattern = {}, {}
    for path in targets:
        before = method.at(path)
        rank = ranks.get(path, before.rank)
        # With `adjust` the scale alpha / rank stays the same.
        alpha = before.alpha * rank / before.rank if adjust and rank != before.rank else before.alpha
        name = path.replace("/", ".")
        if rank != method.rank:
            rank_pattern[name] = rank
        if alpha != method.alpha:
            alpha_pattern[name] = alpha
    return replace(method, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
