"""From a model's parameters to the two trees of a run: what is frozen, and what trains."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxpeft.adapters.contract import Method, Site
from jaxpeft.errors import InputError
from jaxpeft.paths import Adapters, Params, leaf_paths, split


def init_adapters(
    params: Params,
    method: Method | None,
    targets: Mapping[str, Site],
    *,
    rng: jax.Array,
    whole_leaves: Iterable[str] = (),
) -> tuple[Params, Adapters]:
    """Return `(frozen, adapters)` for a model's `params`.

    Args:
        params: all parameters of the model, nested.
        method: what is learned at the `targets`; None for a baseline without adapters.
        targets: the adapted layers, by path (`match_targets`).
        rng: key of the initial values. Each layer folds its own path in, so that it starts the same whatever else is adapted.
        whole_leaves: leaf paths that train whole, in fp32: a new head, or everything.

    Raises:
        InputError: where the rank exceeds a layer's width, or a leaf stored in 4 bits is to train whole.
    """
    whole = set(whole_leaves)
    for path, leaf in leaf_paths(params).items():
        if path in whole and hasattr(leaf, "codes"):
            raise InputError(
                f"{path} is stored in 4 bits and cannot train whole; keep it out of the quantised base, or do not train it"
            )
    sites = {path: _init_site(method, site, rng) for path, site in targets.items()} if method else {}
    frozen, modules = split(params, whole.__contains__)
    # Copies: a training step is donated its state, and must not take the caller's `params` with it.
    modules = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), modules)
    return frozen, {"sites": sites, "modules": modules}


def _init_site(method: Method, site: Site, rng: jax.Array) -> dict[str, jax.Array]:
    rank, width = getattr(method, "rank", 1), min(site.d_in, site.d_out)
    if not 1 <= rank <= width:
        raise InputError(
            f"adapter.rank {rank} is outside 1 to {width}, the width of layer {site.path} ({site.d_in} to {site.d_out})"
        )
    return method.init(jax.random.fold_in(rng, zlib.crc32(site.path.encode())), site)
