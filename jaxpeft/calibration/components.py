"""The principal components of what adapted layers see: what EVA starts from, and how it deals out the ranks.

Paischer et al. 2024, arXiv 2410.07170, section 3 and algorithm 1; PEFT's `get_eva_state_dict`. Layers with the same input (query,
key, value) share one decomposition. Of all components of all layers, those that explain most of their layer's variance get the
ranks: as many as there were, at most rho times its own for each layer, none for some.

Differs from PEFT: with `whiten` every layer's components are divided by the roots of their singular values once. PEFT does so in
place, and again for each further layer with the same input.
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
    """What EVA starts from.

    Attributes:
        method: with the new ranks and alphas as `rank_pattern` and `alpha_pattern`.
        targets: the adapted layers, less those of rank 0.
        components: by linear layer, A `[d_in, rank]`.
    """

    method: Lora
    targets: dict[str, Site]
    components: dict[str, jax.Array]


def input_components(
    model: Model, method: Lora, targets: Mapping[str, Site], batches: Collection[Mapping[str, Any]]
) -> Components:
    """Run the frozen `model` over `batches`, again and again until the components stand still, and deal out the ranks.

    Only tokens under `attention_mask` count, in rows of some weight; with `use_label_mask` only those with a label: at the batch's
    `positions` where there are such, or where `labels`, one for each token, are not `label_mask_value`. A layer that sees rows
    instead of tokens (a pooler) counts those with a token that does. As in PEFT, embeddings keep the start they have without EVA.

    Args:
        model: the base, run without dropout.
        method: LoRA with `eva_config`: tau is the cosine at which a component stands still, rho as above.
        targets: the layers to adapt, by path.
        batches: as `jaxpeft.data` makes them; a layer leaves out those with fewer tokens than components.

    Raises:
        InputError: without batches, where rho times the rank exceeds a layer's width, every batch is too small, or components
            do not come to stand still.
    """
    options = full_options("eva_config", method.eva_config)
    linear = [path for path, site in targets.items() if site.kind == "linear"]
    if not len(batches):
        raise InputError("EVA starts from the layers' inputs and was given no batch to see them on")
    budget = sum(method.at(path).rank for path in linear)
    most = {path: _most(method.at(path).rank, options["rho"], targets[path]) for path in linear}
    see = _recorder(model, linear)
    first = next(iter(batches))
    leaders = _leaders(see(first, _counted(first, options)))
    for path, leader in leaders.items():
        most[leader] = max(most[leader], most[path])
    most = {path: most[leaders[path]] for path in most}

    fits: dict[str, Fit] = {}
    ranks = dict(most)
    for i, batch in enumerate(itertools.cycle(batches)):
        moving = [
            p for p in leaders.values() if p not in fits or (fits[p].similarity[: ranks[p]] < options["tau"]).any()
        ]
        if not moving:
            break
        _check_progress(i, len(batches), leaders.values(), fits, most, moving)
        inputs = see(batch, _counted(batch, options))
        for path in dict.fromkeys(moving):
            if len(rows := inputs[path]) >= most[path]:
                fits[path] = updated(fits.get(path), rows, most[path])
        if fits.keys() == set(leaders.values()):
            ranks = _deal_out(fits, leaders, budget, most)
    components = {path: _start(fits[leaders[path]], rank, options["whiten"]) for path, rank in ranks.items() if rank}
    kept = {path: site for path, site in targets.items() if ranks.get(path) != 0}
    return Components(_with_ranks(method, kept, ranks, options["adjust_scaling_factors"]), kept, components)


def record_inputs(module: nn.Module, params: Params, layers: Iterable[str], **inputs: Any) -> dict[str, jax.Array]:
    """Run `module` without dropout; return the first argument of each of the `layers`, such as x: `[batch, seq, d_in]`.

    Pure, for use inside `jax.jit`; kernels may be quantised. A module that checkpoints gradients is run without that.
    """
    if getattr(module, "gradient_checkpointing", False):
        module = module.clone(gradient_checkpointing=False)  # nothing could be carried out of its layers
    seen: dict[str, jax.Array] = {}

    def tap(path: str) -> Callable[[jax.Array], jax.Array]:
        def keep(x: jax.Array) -> jax.Array:
            seen[path] = x
            return x

        return keep

    apply(module, params, {"sites": {}, "modules": {}}, input_hooks={path: tap(path) for path in layers}, **inputs)
    return seen


def _recorder(model: Model, layers: list[str]) -> Callable[[Mapping[str, Any], np.ndarray], dict[str, np.ndarray]]:
    """`(batch, counted) → layer → rows [n, d_in]` in float32, on the host."""

    @jax.jit
    def record(params: Params, batch: dict[str, Any]) -> dict[str, jax.Array]:
        return record_inputs(model.module, params, layers, **model.inputs(batch))

    def see(batch: Mapping[str, Any], counted: np.ndarray) -> dict[str, np.ndarray]:
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        found = record(model.params, tokens)
        # In the order of the layers again, which jit does not keep.
        return {path: _rows(np.asarray(found[path].astype(jnp.float32)), counted) for path in layers}

    return see


def _rows(x: np.ndarray, counted: np.ndarray) -> np.ndarray:
    return x[counted] if x.ndim > 2 else x[counted.any(axis=1)]


def _counted(batch: Mapping[str, Any], options: Mapping[str, Any]) -> np.ndarray:
    """Which tokens count, bool `[batch, seq]`."""
    counted = np.asarray(batch["attention_mask"]).astype(bool)
    positions, labels = batch.get("positions"), batch.get("labels")
    weights = np.asarray(batch.get("weights", np.ones(counted.shape[:1] if positions is None else np.shape(positions))))
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


def _most(rank: int, rho: float, site: Site) -> int:
    """The components that a layer may get."""
    most, width = round(rank * rho), min(site.d_in, site.d_out)
    if most > width:
        raise InputError(
            f"EVA may give layer {site.path} rho·rank = {rho:g}·{rank} components, and its width is {width}: lower eva_config.rho or "
            "adapter.rank"
        )
    return most


def _leaders(inputs: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Layer → the first layer with the same input; those that are their own come first, as in PEFT."""
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
    """Raise InputError where going on would never end."""
    for path in leaders if step >= num_batches else ():
        if path not in fits:
            raise InputError(
                f"no batch shows layer {path} the {most[path]} tokens that so many components need: give larger batches, or set "
                "eva_config.use_label_mask to false"
            )
    if step >= _MAX_PASSES * num_batches:
        raise InputError(
            f"the components of layer {moving[0]} still move after {_MAX_PASSES} passes over {num_batches} batches: give more batches, "
            "or lower eva_config.tau"
        )


def _deal_out(
    fits: Mapping[str, Fit], leaders: Mapping[str, str], budget: int, most: Mapping[str, int]
) -> dict[str, int]:
    """The rank of each layer: how many of the `budget` most explaining components are its own."""
    shares = [(share, path) for path, leader in leaders.items() for share in fits[leader].explained[: most[leader]]]
    strongest = sorted(shares, key=lambda pair: -pair[0])[:budget]
    counts = Counter(path for _, path in strongest)
    ranks = {path: counts[path] for path in leaders}
    for path, leader in leaders.items():
        # Components of equal layers tie; the leader, whose convergence is watched, gets the most.
        if ranks[leader] < ranks[path]:
            ranks[leader], ranks[path] = ranks[path], ranks[leader]
    return ranks


def _start(fit: Fit, rank: int, whiten: bool) -> jax.Array:
    """A `[d_in, rank]`."""
    components = fit.components[:rank]
    if whiten:
        components = components / np.sqrt(fit.singular_values[:rank, None])
    return jnp.asarray(components.T)


def _with_ranks(method: Lora, targets: Iterable[str], ranks: Mapping[str, int], adjust: bool) -> Lora:
    """`method` with a pattern for every layer whose rank or alpha is not the common one."""
    rank_pattern, alpha_pattern = {}, {}
    for path in targets:
        before = method.at(path)
        rank = ranks.get(path, before.rank)
        alpha = before.alpha * rank / before.rank if adjust and rank != before.rank else before.alpha
        name = path.replace("/", ".")
        if rank != method.rank:
            rank_pattern[name] = rank
        if alpha != method.alpha:
            alpha_pattern[name] = alpha
    return replace(method, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
