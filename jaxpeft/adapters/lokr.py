"""LoKr: W = W₀ + s·(W₁ ⊗ W₂), s = alpha/rank, a Kronecker product of two small matrices (Yeh et al. 2023, arXiv 2309.14859).

d_in = m·n and d_out = l·k. With `w1: [m, l]` and `w2: [n, k]`, entry (i·n + j, p·k + q) of the update is W₁[i, p]·W₂[j, q]. If W₂ is
large compared with the rank, it is itself a product of rank r: W₂ = B₂·A₂ with `w2_b: [n, r]`, `w2_a: [r, k]`. With
`decompose_both` the same holds for W₁. A transposed Kronecker product is the product of the transposed factors in the same order,
so PEFT's tensors are the transposes of ours, and the names are PEFT's.

As in PEFT, and unlike LyCORIS, s applies even if no factor is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteParams
from jaxpeft.adapters.entry_effects import EntryEffects, of_entries, of_factors
from jaxpeft.adapters.low_rank import kaiming
from jaxpeft.adapters.lycoris import Lycoris
from jaxpeft.adapters.pruned_ranks import without_pruned_ranks
from jaxpeft.errors import InputError
from jaxpeft.trees import Layers


def entry_effects(params: SiteParams) -> SiteParams:
    """How much the update W₁ ⊗ W₂ changes if an entry is set to zero (`adapters.entry_effects`).

    The update's blocks are W₁[i, p]·W₂. So ∂ΔW/∂W₁[i, p] is W₂ in block (i, p), with norm ‖W₂‖, and ∂ΔW/∂W₂[j, q] is W₁ spread over
    the blocks, with norm ‖W₁‖. An entry of W₁ has the effect |W₁[i, p]|·‖W₂‖. If W₁ = B₁·A₁, entries of B₁ and A₁ have their effects on
    that product, times ‖W₂‖. The same holds for W₂ with ‖W₁‖. No array is larger than W₁ or W₂.
    """
    effects = of_entries(params)
    for one, other in (("w1", "w2"), ("w2", "w1")):
        norm = jnp.linalg.norm(_factor(params, other))
        if one in params:
            effects[one] *= norm
        else:
            b, a = of_factors(params[f"{one}_b"], params[f"{one}_a"])
            effects |= {f"{one}_b": b * norm, f"{one}_a": a * norm}
    return effects


@dataclass(frozen=True)
class Lokr(Lycoris):
    """Low-rank Kronecker product.

    Attributes:
        decompose_both: give W₁ a low rank too.
        decompose_factor: m and l if it divides d_in and d_out, else their upper bound; -1: near the square root.
        rank_dropout_scale: scale up the outputs that `rank_dropout` keeps.
        init_weights: the factor that is zero at first: W₁ (True), W₂ ("lycoris") or none (False, for tests).
    """

    name: ClassVar[str] = "lokr"
    description: ClassVar[Description] = Description(
        title="LoKr",
        equation="W = W₀ + s·C ⊗ (AB)",
        source="Yeh et al. 2023, arXiv 2309.14859",
        advice="the smallest file among the methods that train matrices",
        peft="`LOKR`",
    )
    prunable: ClassVar[tuple[str, ...]] = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")
    products: ClassVar[tuple[tuple[str, str], ...]] = (("w1_b", "w1_a"), ("w2_b", "w2_a"))
    entry_effects: ClassVar[EntryEffects | None] = staticmethod(entry_effects)
    default_role: ClassVar[str | None] = "attention_qv"
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`w1: [m, l]` or `w1_b: [m, r]` and `w1_a: [r, l]`; `w2: [n, k]` or `w2_b: [n, r]` and `w2_a: [r, k]`.

        Each is uniform, ±1/√rows, but w1 or w1_a is zero; with "lycoris" it is w2 or w2_b.

        Raises:
            InputError: for an unknown `init_weights`.
        """
        if self.init_weights not in (True, False, "lycoris"):
            raise InputError(f"unknown init_weights '{self.init_weights}'; it must be true, false or lycoris")
        m, n = split_width(site.d_in, self.decompose_factor)
        l, k = split_width(site.d_out, self.decompose_factor)  # noqa: E741
        r = self.rank
        shapes = {"w1": (m, l)} if not (self.decompose_both and r < max(m, l) / 2) else {"w1_a": (r, l), "w1_b": (m, r)}
        shapes |= {"w2": (n, k)} if not r < max(n, k) / 2 else {"w2_a": (r, k), "w2_b": (n, r)}
        zero = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), False: ()}[self.init_weights]
        keys = dict(zip(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"), jax.random.split(rng, 6), strict=True))
        return {
            name: jnp.zeros(shape, jnp.float32) if name in zero else kaiming(keys[name], shape, shape[0])
            for name, shape in shapes.items()
        }

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + s·(W₁ ⊗ W₂)."""
        return frozen_kernel + self.scaling * jnp.kron(_factor(params, "w1"), _factor(params, "w2"))

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """With x as an [m, n] matrix X the update is W₁ᵀ·X·W₂, computed from the small factors."""
        x = layer.cast(x)
        blocks = x.reshape(*x.shape[:-1], params["w1" if "w1" in params else "w1_b"].shape[0], -1)
        h = _times_factor(blocks, params, "w2", layer)
        h = _times_factor(jnp.swapaxes(h, -1, -2), params, "w1", layer)
        delta = jnp.swapaxes(h, -1, -2).reshape(*x.shape[:-1], -1)
        return layer.base(x) + self.dropped(self.scaling * delta, rng, rescaled=self.rank_dropout_scale)

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """Without the ranks that `masks` prune as a whole, as far as the rank still gives the layer the same parameters."""
        return without_pruned_ranks(self, sites, masks, fewest=self._fewest_ranks)

    def _fewest_ranks(self, params: SiteParams) -> int:
        """The smallest rank for which `init` decomposes no factor that is whole in `params`."""
        whole = [name for name in (("w1", "w2") if self.decompose_both else ("w2",)) if name in params]
        return max([1, *(-(-max(params[name].shape) // 2) for name in whole)])


def _factor(params: SiteParams, name: str) -> jax.Array:
    """W₁ or W₂, multiplied out if it is decomposed."""
    return params[name] if name in params else params[f"{name}_b"] @ params[f"{name}_a"]


def _times_factor(x: jax.Array, params: SiteParams, name: str, layer: FrozenLayer) -> jax.Array:
    """x·W₁ or x·W₂ over the last axis; a decomposed factor is never multiplied out."""
    if name in params:
        return layer.times(x, params[name])
    return layer.times(layer.times(x, params[f"{name}_b"]), params[f"{name}_a"])


def split_width(width: int, factor: int) -> tuple[int, int]:
    """A width as a product of two numbers, by LyCORIS's rule.

    If `factor` divides the width, the numbers are `factor` and the quotient. Otherwise the first is the largest divisor up to the
    square root of the width, and up to `factor` unless that is -1:

    >>> split_width(768, -1), split_width(768, 4), split_width(768, 7), split_width(127, -1)
    ((24, 32), (4, 192), (6, 128), (1, 127))
    """
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    largest = math.isqrt(width) if factor == -1 else min(math.isqrt(width), max(factor, 1))
    divisor = next(d for d in range(largest, 0, -1) if width % d == 0)
    return divisor, width // divisor
