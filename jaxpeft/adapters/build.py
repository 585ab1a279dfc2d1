"""Cut a model's parameters into the two trees of a run: the frozen ones, and the adapters that train."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import HasConstants, Method, ModifiesBase, SharesFactors, Site, SiteMethod
from jaxpeft.adapters.options import check_names
from jaxpeft.errors import InputError
from jaxpeft.quantization import dequantize, is_quantized, quantize_like
from jaxpeft.trees import CONSTANTS, SHARED, Adapters, Layers, Params, leaf_paths, nest, split


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
        method: the adapter method at the `targets`; None for a baseline without adapters.
        targets: the adapted layers, by path (`match_targets`).
        rng: key of the initial values. Each layer folds in its own path, so its values do not depend on the other adapted layers.
        fully_trained: paths of the fully trained leaves, in fp32: a new head, or everything.
        statistics: by layer, the result of `jaxpeft.calibration.calibrate`, for a method that needs some (`SiteMethod.statistics`).

    Raises:
        InputError: if the rank exceeds a layer's width, the method cannot adapt an embedding, its initialisation lacks statistics or
            needs a base in full precision, or a fully trained leaf is stored quantised.
    """
    whole = set(fully_trained)
    leaves = leaf_paths(params)
    for path, leaf in leaves.items():
        if path in whole and is_quantized(leaf):
            raise InputError(
                f"{path} is stored quantised and cannot be fully trained; keep it out of the quantised base, or do not train it"
            )
    # Of a method with constants the statistics choose these, and have no part in the initial values.
    of_values = {} if isinstance(method, HasConstants) else statistics or {}
    sites: dict[str, dict[str, jax.Array]] = {}
    for path, site in targets.items() if isinstance(method, SiteMethod) else ():
        assert isinstance(method, SiteMethod)
        if site.kind == "embedding" and not method.embeddings:
            raise InputError(f"{method.name} cannot adapt the embedding '{path}'; leave it out of target_modules")
        sites[path], leaves[_matrix(site)] = _init_site(
            method.at(path), site, leaves[_matrix(site)], rng, of_values.get(path)
        )
    frozen, modules = split(nest(leaves), whole.__contains__)
    if isinstance(method, SharesFactors) and (shared := method.init_shared(rng, targets)):
        frozen = {**frozen, SHARED: shared}
    if isinstance(method, HasConstants) and targets:
        frozen = {**frozen, CONSTANTS: init_constants(method, targets, leaves, rng=rng, statistics=statistics)}
    # Copies: a training step consumes its state (donation), and must not consume the caller's `params` with it.
    modules = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), modules)
    return frozen, {"sites": sites, "modules": modules}


def init_constants(
    method: HasConstants,
    targets: Mapping[str, Site],
    leaves: Mapping[str, Any],
    *,
    rng: jax.Array,
    statistics: Mapping[str, jax.Array] | None = None,
) -> Layers:
    """The constants of `method` at each of the `targets`, by layer path.

    Args:
        method: the adapter method.
        targets: the adapted layers, by path.
        leaves: the base's leaves, by path; kernels may be quantised.
        rng: key of what is drawn. Each layer folds in its own path.
        statistics: by layer, what was measured there.

    Raises:
        InputError: as `HasConstants.init_constants`.
    """
    found = {}
    for path, site in targets.items():
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        found[path] = method.at(path).init_constants(
            key, site, functools.partial(dense_kernel, leaves, site), (statistics or {}).get(path)
        )
    return found


def dense_kernel(leaves: Mapping[str, Any], site: Site) -> jax.Array:
    """The frozen matrix `[d_in, d_out]` of `site` in fp32, dequantised if it is stored quantised; `leaves` are the base's, by path."""
    return _dense(leaves[_matrix(site)])


def checked_options(kind: type[Method], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`given` as arguments of the method class `kind`; a list becomes a tuple if the option's default is one.

    Args:
        kind: the class of the method.
        given: option → value, as read from a file or a flag.
        where: the place of the options, for messages.

    Raises:
        InputError: if the method lacks an option, or a value has not the type of the option's default.
    """
    options = {option.name: option for option in fields(kind)}  # type: ignore[arg-type]
    checked = {}
    check_names(kind, given, f"{where}: the method {kind.name}")
    for name, value in given.items():
        default = options[name].default
        value = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
        # Types are compared as they are, because bool is a subclass of int. A bool default may have names as alternatives.
        fits = type(value) is type(default) or (type(default) is float and type(value) is int)
        if type(default) in (int, float, str, tuple) and not fits:
            raise InputError(f"{where}: {name} of {kind.name} must be a {type(default).__name__}; got {value!r}")
        checked[name] = value
    return checked


def with_adjusted_base(frozen: Params, method: ModifiesBase, targets: Mapping[str, Site]) -> Params:
    """`frozen` with the kernels at the `targets` adjusted for a new adapter of `method.deterministic_init()`."""
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
    """A new adapter for `site`, and the frozen matrix that goes with it."""
    key = jax.random.fold_in(rng, zlib.crc32(site.path.encode()))
    if not isinstance(method, ModifiesBase):
        if statistics is not None:
            raise InputError(
                f"{method.name} is not initialised from data: leave out the calibration statistics of layer {site.path}"
            )
        return method.init(key, site, lambda: _dense(leaf)), leaf
    if method.needs_full_precision and is_quantized(leaf):
        raise InputError(
            f"layer {site.path} is stored quantised, and this initialisation of {method.name} needs its weights in full "
            "precision: do not quantise the base, or choose another initialisation"
        )
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
    """`kernel` stored as `leaf` is: in its dtype, or quantised again."""
    return quantize_like(leaf, kernel) if is_quantized(leaf) else kernel.astype(leaf.dtype)
