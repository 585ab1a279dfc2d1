"""LoHa: W = W₀ + s·(B₁·A₁) ⊙ (B₂·A₂), s = alpha/rank: a product of two low-rank matrices, entry by entry.

Hyeon-Woo et al. 2021 (FedPara, arXiv 2108.06098, proposition 1) give the parameterisation, whose rank reaches r²; Yeh et al. 2023
(LyCORIS, arXiv 2309.14859) make an adapter of it. This file differs from LyCORIS as PEFT does: the initialisation is uniform, not
normal. Names are PEFT's, matrices transposed: `w1_a, w2_a: [r, d_out]`, `w1_b, w2_b: [d_in, r]`.

Cost: W − W₀ has a factorisation of rank r². Its factors are the columns of B₁ and B₂ multiplied pair by pair, and the rows of A₁
and A₂ likewise (the Khatri-Rao product):

    (B₁·A₁) ⊙ (B₂·A₂) = (B₁ ∗ B₂)·(A₁ ∗ A₂),   B₁ ∗ B₂: [d_in, r²],   A₁ ∗ A₂: [r², d_out]

At small ranks the layer is computed so, as a LoRA of rank r² (64 for r = 8). From r² ≥ d_in·d_out / (d_in + d_out) on (r 20 at
768 × 768) the `[d_in, d_out]` update is built instead. With N = d_in·d_out that costs 6N FLOPs per token in training on top of the
layer's own 4N, and 4·r·N each time the update is built, plus its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteParams
from jaxpeft.adapters.entry_effects import EntryEffects, of_entries
from jaxpeft.adapters.low_rank import kaiming
from jaxpeft.adapters.lycoris import Lycoris
from jaxpeft.adapters.pruned_ranks import without_pruned_ranks
from jaxpeft.trees import Layers


def entry_effects(params: SiteParams) -> SiteParams:
    """How much the update (B₁·A₁) ⊙ (B₂·A₂) changes if an entry is set to zero (`adapters.entry_effects`).

    With P₂ = B₂·A₂, ∂ΔW/∂B₁[i, k] is row k of A₁ times row i of P₂, in row i; ∂ΔW/∂A₁[k, j] is column k of B₁ times column j of P₂. So

        effect of B₁[i, k] = |B₁[i, k]|·√(P₂²·(A₁²)ᵀ)[i, k],   effect of A₁[k, j] = |A₁[k, j]|·√((B₁²)ᵀ·P₂²)[k, j]

    with squares entry by entry, and likewise for B₂ and A₂ with P₁. The largest array is P₂ or P₁, `[d_in, d_out]`.
    """
    times = partial(jnp.matmul, precision="highest")
    effects = of_entries(params)
    for one, other in (("w1", "w2"), ("w2", "w1")):
        across = jnp.square(times(params[f"{other}_b"], params[f"{other}_a"]))
        b, a = jnp.square(params[f"{one}_b"]), jnp.square(params[f"{one}_a"])
        effects[f"{one}_b"] *= jnp.sqrt(times(across, a.T))
        effects[f"{one}_a"] *= jnp.sqrt(times(b.T, across))
    return effects


@dataclass(frozen=True)
class Loha(Lycoris):
    """Low-rank Hadamard product; `rank_dropout` scales up the outputs it keeps, as in PEFT."""

    name: ClassVar[str] = "loha"
    description: ClassVar[Description] = Description(
        title="LoHa",
        equation="W = W₀ + s·(A₁B₁) ⊙ (A₂B₂)",
        source="Hyeon-Woo et al. 2021, arXiv 2108.06098",
        advice="an update of rank up to r², with as many parameters as a LoRA of rank 2r",
        peft="`LOHA`",
    )
    prunable: ClassVar[tuple[str, ...]] = ("w1_a", "w1_b", "w2_a", "w2_b")
    products: ClassVar[tuple[tuple[str, str], ...]] = (("w1_b", "w1_a"), ("w2_b", "w2_a"))
    entry_effects: ClassVar[EntryEffects | None] = staticmethod(entry_effects)
    default_role: ClassVar[str | None] = "attention_qv"
    input_axes: ClassVar[Mapping[str, int]] = {"w1_b": 0, "w2_b": 0}
    output_axes: ClassVar[Mapping[str, int]] = {"w1_a": 1, "w2_a": 1}
    init_weights: bool = True

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`w1_a`, `w2_a: [rank, d_out]` on ±1/√rank, `w1_b: [d_in, rank]` on ±1/√d_in, `w2_b` = 0 (not without `init_weights`)."""
        keys, r = jax.random.split(rng, 4), self.rank
        w2_b = kaiming(keys[3], (site.d_in, r), site.d_in)
        return {
            "w1_a": kaiming(keys[0], (r, site.d_out), r),
            "w1_b": kaiming(keys[1], (site.d_in, r), site.d_in),
            "w2_a": kaiming(keys[2], (r, site.d_out), r),
            "w2_b": jnp.zeros_like(w2_b) if self.init_weights else w2_b,
        }

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + s·(B₁·A₁) ⊙ (B₂·A₂)."""
        return frozen_kernel + self.scaling * _update(params)

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """By the thin factors, or by the full update if that is cheaper: see the top of this file."""
        x = layer.cast(x)
        (d_in, r), d_out = params["w1_b"].shape, params["w1_a"].shape[1]
        if r**2 * (d_in + d_out) < d_in * d_out:
            left, right = _factors(params)
            delta = layer.times(layer.times(x, left), right)
        else:
            # Recompute the update in the backward pass, as PEFT does: storing it keeps three [d_in, d_out] matrices per layer.
            delta = jax.checkpoint(lambda x, params: layer.times(x, _update(params)))(x, params)
        return layer.base(x) + self.dropped(self.scaling * delta, rng, rescaled=True)

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """Without the ranks that `masks` prune as a whole: as many as the fuller of the two products has left."""
        return without_pruned_ranks(self, sites, masks)


def _update(params: SiteParams) -> jax.Array:
    """(B₁·A₁) ⊙ (B₂·A₂): `[d_in, d_out]`."""
    return (params["w1_b"] @ params["w1_a"]) * (params["w2_b"] @ params["w2_a"])


def _factors(params: SiteParams) -> tuple[jax.Array, jax.Array]:
    """B₁ ∗ B₂: `[d_in, r²]` and A₁ ∗ A₂: `[r², d_out]`, whose product is the update."""
    left = params["w1_b"][:, :, None] * params["w2_b"][:, None, :]
    right = params["w1_a"][:, None, :] * params["w2_a"][None, :, :]
    return left.reshape(left.shape[0], -1), right.reshape(-1, right.shape[-1])
