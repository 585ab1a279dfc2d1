"""From a model's parameters to the two trees of a run: what is frozen, and what trains."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Method, Site, SiteMethod
from jaxpeft.errors import InputError
from jaxpeft.quantization import dequantize, is_quantized, quantize_like
from jaxpeft.trees import SHARED, Adapters, Params, leaf_paths, nest, split


def init_adapters(
    params: Params,
    method: Method | None,
    targets: Mapping[str, Site],
    *,
    rng: jax.Array,
    fully_trained: Iterable[str] = (),
    statistics: Mapping[str, jax.Array] | None = None,
) -> tuple[Params, Adapters]:
    """Return `(frozen, adapters)` for a model's `params`.

    Args:
        params: all parameters of the model, nested.
        method: what is learned at the `targets`; None for a baseline without adapters.
        targets: the adapted layers, by path (`match_targets`).
        rng: key of the initial values. Each layer folds its own path in, so that it starts the same whatever else is adapted.
        fully_trained: leaf paths that train whole, in fp32: a new head, or everything.
        statistics: by layer, what `jaxpeft.calibration.calibrate` measured for a start from data (LoRA's eva and lora_ga).

    Raises:
        InputError: where the rank exceeds a layer's width, the method cannot adapt an embedding, its start lacks evidence or wants
            a base in full precision, or a quantised leaf is to train whole.
    """
    whole = set(fully_trained)
    leaves = leaf_paths(params)
    for path, leaf in leaves.items():
        if path in whole and is_quantized(leaf):
            raise InputError(
                f"{path} is stored quantised and cannot train whole; keep it out of the quantised base, or do not train it"
            )
    sites: dict[str, dict[str, jax.Array]] = {}
    for path, site in targets.items() if isinstance(method, SiteMethod) else ():
        assert isinstance(method, SiteMethod)
        if site.kind == "embedding" and not method.embeddings:
            raise InputError(f"{method.name} cannot adapt the embedding '{path}'; leave it out of target_modules")
        sites[path], leaves[_matrix(site)] = _init_site(
            method.at(path), site, leaves[_matrix(site)], rng, (statistics or {}).get(path)
        )
    frozen, modules = split(nest(leaves), whole.__contains__)
    if isinstance(method, SiteMethod) and (shared := method.init_shared(rng, targets)):
        frozen = {**frozen, SHARED: shared}
    # Copies: a training step is donated its state, and must not take the caller's `params` with it.
    modules = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), modules)
    return frozen, {"sites": sites, "modules": modules}


def with_adjusted_base(frozen: Params, method: SiteMethod, targets: Mapping[str, Site]) -> Params:
    """`frozen` with the kernels at the `targets` as a fresh adapter of `method.repeatable()` changes them."""
    method = method.deterministic_init()
    if not method.modifies_base:
        return frozen
    leaves = leaf_paths(frozen)
    for path, site in targets.items():
        leaves[_matrix(site)] = _init_site(method.at(path), site, leaves[_matrix(site)], jax.random.key(0))[1]
    return nest(leaves)


def _init_site(
    method: SiteMethod, site: Site, leaf: Any, rng: jax.Array, statistics: jax.Array | None = None
) -> tuple[dict[str, jax.Array], Any]:
    """A fresh adapter for `site`, and the frozen matrix that goes with it."""
    if method.needs_full_precision and is_quantized(leaf):
        raise InputError(
            f"layer {site.path} is stored quantised, and this start of {method.name} is a part of its weights in full precision: "
            "do not quantise the base, or start otherwise"
        )
    key = jax.random.fold_in(rng, zlib.crc32(site.path.encode()))
    if statistics is None:
        params = method.init(key, site, lambda: _dense(leaf))
    else:
        params = method.init_from(statistics, key, site, lambda: _dense(leaf))
    return params, _stored_like(leaf, method.adjust_base(_dense(leaf), params)) if method.modifies_base else leaf


def _matrix(site: Site) -> str:
    return f"{site.path}/{'embedding' if site.kind == 'embedding' else 'kernel'}"


def _dense(leaf: Any) -> jax.Array:
    return dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf, jnp.float32)


def _stored_like(leaf: Any, kernel: jax.Array) -> Any:
    """`kernel` in the storage that `leaf` has: its dtype, or quantised again."""
    return quantize_like(leaf, kernel) if is_quantized(leaf) else kernel.astype(leaf.dtype)
