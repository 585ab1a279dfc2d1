"""A smaller adapter from one whose masks prune whole ranks: fewer ranks in a layer, and the scaling that it was trained with.

Rank k of a product L·R is column k of L and row k of R. If either is pruned as a whole, the rank adds nothing and can go. A layer
keeps at least one rank, of zeros if all were pruned: then its name need not leave `target_modules`, which PEFT would otherwise
fill with a new adapter.

The scaling must stay s = alpha/r, or alpha/√r for rank-stabilised LoRA. So a layer of r' ranks gets alpha' = s·r', or s·√r'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import SiteMethod, SiteParams
from jaxpeft.trees import Layers

M = TypeVar("M", bound=SiteMethod)

Pair = tuple[str, str]
"""The names of a product's factors, `[d_in, r]` and `[r, d_out]`."""


def without_pruned_ranks(
    method: M, sites: Layers, masks: Layers, *, fewest: Callable[[SiteParams], int] = lambda params: 1
) -> tuple[M, Layers]:
    """`method` and `sites` with only the ranks that `masks` keep; as they are if no layer loses a rank.

    If all layers have the same rank and alpha after it, they become the method's own. If not, `rank_pattern` and `alpha_pattern`
    name every layer. The patterns that the method had are in them.

    Args:
        method: a method with `products`, whose ranks its rank counts, `rank_pattern` and, if it is scaled, `alpha` and
            `alpha_pattern`. The update is zero if one product of a layer is. A layer has as many ranks as its fullest product, and
            the others are filled with ranks of zeros.
        sites: the parameters, with zeros in the place of pruned entries.
        masks: bool, True = keep. A parameter without a mask is dense.
        fewest: from the parameters of a layer to the smallest rank that it may get.
    """
    left: Layers = {}
    options: dict[str, tuple[int, float | None]] = {}
    for path, params in sites.items():
        own: Any = method.at(path)
        pairs = [pair for pair in method.products if pair[0] in params]
        kept = [_kept(params, masks.get(path, {}), pair) for pair in pairs]
        fullest = max(map(len, kept), default=own.rank) if all(map(len, kept)) else 0
        rank = max(fullest, fewest(params))
        alpha = None
        if hasattr(own, "alpha"):
            # Where nothing is pruned, alpha must not change by rounding.
            alpha = own.alpha if rank == own.rank else own.scaling / replace(own, rank=rank, alpha=1.0).scaling
        options[path] = rank, alpha
        chosen = {}
        for (wide, tall), ranks in zip(pairs, kept, strict=True):
            chosen[wide] = _filled(params[wide][:, ranks], rank, axis=1)
            chosen[tall] = _filled(params[tall][ranks], rank, axis=0)
        left[path] = params if rank == own.rank else {**params, **chosen}
    if all(left[path] is params for path, params in sites.items()):
        return method, sites
    smaller: M = _with_options(method, options)
    return smaller, left


def _kept(params: SiteParams, masks: Mapping[str, jax.Array], pair: Pair) -> np.ndarray:
    """The numbers of the ranks that have an entry left on both sides."""
    wide, tall = (np.asarray(masks[name]) if name in masks else np.ones(params[name].shape, bool) for name in pair)
    return np.flatnonzero(wide.any(0) & tall.any(1))


def _filled(matrix: jax.Array, rank: int, *, axis: int) -> jax.Array:
    """`matrix` with ranks of zeros behind its own, so that it has `rank` of them, or the first `rank` of its own."""
    missing = rank - matrix.shape[axis]
    width = [(0, max(missing, 0)) if i == axis else (0, 0) for i in range(2)]
    return jnp.take(jnp.pad(matrix, width), np.arange(rank), axis=axis)


def _with_options(method: Any, options: Mapping[str, tuple[int, float | None]]) -> Any:
    scaled = hasattr(method, "alpha")
    names = sorted(
        options, key=lambda path: (-len(path), path)
    )  # a name may be the end of a longer one, which must be first
    if len(set(options.values())) == 1:
        rank, alpha = options[names[0]]
        return replace(method, rank=rank, rank_pattern={}, **({"alpha": alpha, "alpha_pattern": {}} if scaled else {}))
    dotted = {path.replace("/", "."): options[path] for path in names}
    alphas = {name: alpha for name, (_, alpha) in dotted.items()}
    ranks = {name: rank for name, (rank, _) in dotted.items()}
    return replace(method, rank_pattern=ranks, **({"alpha_pattern": alphas} if scaled else {}))
