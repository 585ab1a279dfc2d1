"""SoRA: y = x·W₀ + s·((dropout(x)·A) ⊙ g)·B, a LoRA whose gate g learns the rank (Ding et al. 2023, arXiv 2311.11696, section 3.2).

The gate is trained by proximal gradient: after each optimizer step every entry of g moves by `sparse_lambda` towards zero, and stops
there (soft threshold, equation 6). A rank with g_k = 0 computes nothing. It may come back while training, and is left out of the
exported file, which is an ordinary LoRA with g multiplied into A.

As in the authors' code, the threshold is `sparse_lambda` itself and not its product with the learning rate, and g starts as N(0, 1).
Unlike there, weight decay spares g. Parameters: `a: [d_in, r]`, `g: [1, r]`, `b: [r, d_out]`. `rank` is the largest rank, r_max in the
paper. A and B may be pruned too, but not in whole ranks, because these are the gate's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteMethod, SiteParams, check_rank, dropout, in_dtype
from jaxpeft.adapters.entry_effects import EntryEffects, of_product
from jaxpeft.adapters.lora import Lora
from jaxpeft.adapters.low_rank import init_low_rank
from jaxpeft.adapters.products import product
from jaxpeft.errors import InputError
from jaxpeft.trees import Layers


def entry_effects(params: SiteParams) -> SiteParams:
    """How much the update (A ⊙ g)·B changes if an entry is set to zero: |A_ik|·|g_k|·‖B_k·‖ and |B_kj|·|g_k|·‖A_·k‖.

    They are the effects on A·B, times |g_k|. The gate is not pruned, and gets |g_k|.
    """
    effects, gate = of_product(params), jnp.abs(params["g"])
    return {**effects, "a": effects["a"] * gate, "b": effects["b"] * gate.T}


@dataclass(frozen=True)
class Sora(SiteMethod):
    """Sparse low-rank adaptation; `dropout` is the rate on the adapter's input only."""

    name: ClassVar[str] = "sora"
    description: ClassVar[Description] = Description(
        title="SoRA",
        equation="y = xW₀ + s·((xA) ⊙ g)B, s = α/r",
        source="Ding et al. 2023, arXiv 2311.11696",
        advice="to let training choose the rank of every layer",
        peft="`LORA` of the ranks that are left",
    )
    prunable: ClassVar[tuple[str, ...]] = ("a", "b")
    entry_effects: ClassVar[EntryEffects | None] = staticmethod(entry_effects)
    undecayed: ClassVar[tuple[str, ...]] = ("g",)
    loraplus: ClassVar[tuple[str, ...]] = ("b",)
    default_role: ClassVar[str | None] = "attention_qv"
    shareable: ClassVar[tuple[str, ...]] = ("dropout", "rank", "alpha")
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    sparse_lambda: float = 1e-3

    def __post_init__(self) -> None:
        """Refuse a threshold that is not positive."""
        if not self.sparse_lambda > 0:
            raise InputError(
                f"adapter.sparse_lambda is {self.sparse_lambda}; it must be above 0 (for a plain LoRA set adapter.method)"
            )

    @property
    def scaling(self) -> float:
        """The factor s."""
        return self.alpha / self.rank

    @property
    def thresholds(self) -> Mapping[str, float]:
        """The gate's soft threshold after each step."""
        return {"g": self.sparse_lambda}

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`a` and `b` as in LoRA, `g: [1, rank]` ~ N(0, 1). B is zero."""
        check_rank(self.rank, site)
        gate = jax.random.normal(jax.random.fold_in(rng, 1), (1, self.rank))
        return {**init_low_rank(rng, site, self.rank), "g": gate}

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of `a`, `b` and `g`."""
        return {"a": (site.d_in, self.rank), "b": (self.rank, site.d_out), "g": (1, self.rank)}

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + s·(A ⊙ g)·B."""
        return frozen_kernel + self.scaling * ((params["a"] * params["g"]) @ params["b"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """A side path of two thin products, as in LoRA."""
        h = layer.times(dropout(layer.cast(x), self.dropout, rng), params["a"] * params["g"])
        delta = product(h, params["b"].astype(layer.dtype))
        return layer.base(x) + in_dtype(self.scaling, delta) * delta

    def as_saved(self, sites: Layers) -> tuple[SiteMethod, Layers]:
        """The LoRA of the ranks with g_k ≠ 0, with g multiplied into A, and the same scaling in every layer.

        A layer keeps at least one rank, because PEFT knows no rank 0. If its gate is zero, so is the A of that rank.
        """
        ranks, alphas, left = {}, {}, {}
        for path, params in sites.items():
            gate = np.asarray(params["g"])[0]
            chosen = np.flatnonzero(gate)
            chosen = chosen if chosen.size else np.zeros(1, int)
            a, b = (jnp.asarray(params[name]) for name in ("a", "b"))
            left[path] = {"a": a[:, chosen] * jnp.asarray(gate[chosen]), "b": b[chosen]}
            key = path.replace("/", ".")
            if chosen.size != self.rank:
                ranks[key], alphas[key] = int(chosen.size), float(self.scaling * chosen.size)
        lora = Lora(rank=self.rank, alpha=self.alpha, dropout=self.dropout, rank_pattern=ranks, alpha_pattern=alphas)
        return lora, left
