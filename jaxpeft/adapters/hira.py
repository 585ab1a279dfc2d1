"""HiRA: W = W₀ + W₀ ⊙ (A·B), a high-rank update from a low-rank product (Huang et al., ICLR 2025, section 3.2).

There is no alpha and no scaling. Unlike LoRA it needs a product with a full `[d_in, d_out]` matrix in training: about
6N FLOPs per token at an adapted layer instead of 4N, with N = d_in·d_out. It needs a much higher learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteMethod, SiteParams, dropout, drops, with_patterns
from jaxpeft.adapters.entry_effects import EntryEffects, of_product
from jaxpeft.adapters.low_rank import Start, init_low_rank
from jaxpeft.adapters.products import product
from jaxpeft.adapters.pruned_ranks import without_pruned_ranks
from jaxpeft.trees import Layers


@dataclass(frozen=True)
class Hira(SiteMethod):
    """Hadamard high-rank adaptation; `dropout` is the rate on the adapter's input only."""

    name: ClassVar[str] = "hira"
    description: ClassVar[Description] = Description(
        title="HiRA",
        equation="W = W₀ + W₀ ⊙ AB",
        source="Huang et al., ICLR 2025",
        advice="an update of high rank; needs a learning rate several times LoRA's",
        peft="`HIRA`",
    )
    prunable: ClassVar[tuple[str, ...]] = ("a", "b")
    products: ClassVar[tuple[tuple[str, str], ...]] = (("a", "b"),)
    entry_effects: ClassVar[EntryEffects | None] = staticmethod(of_product)
    default_role: ClassVar[str | None] = "attention_qv"
    shareable: ClassVar[tuple[str, ...]] = ("init_weights", "dropout", "rank")
    embeddings: ClassVar[bool] = True
    input_axes: ClassVar[Mapping[str, int]] = {"a": 0}
    output_axes: ClassVar[Mapping[str, int]] = {"b": 1}
    rank: int = 32
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: Start = True

    def at(self, path: str) -> Self:
        """The method with the rank of the first pattern that matches `path`."""
        return with_patterns(self, path)

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`a: [d_in, rank]` and `b: [rank, d_out]`."""
        return init_low_rank(rng, site, self.rank, self.init_weights)

    def shapes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The shapes of `a` and `b`. The rank may exceed the layer's width, as it may in a file."""
        return {"a": (site.d_in, self.rank), "b": (self.rank, site.d_out)}

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + W₀ ⊙ (A·B)."""
        return frozen_kernel + frozen_kernel * (params["a"] @ params["b"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """In fp32 without dropout one product with W₀ ⊙ (1 + A·B), else base and delta separately. For an embedding only the rows."""
        if layer.is_embedding:
            y = layer.base(x)
            return y + y * (product(layer.times(x, params["a"]), params["b"].astype(layer.dtype)))
        kernel = layer.kernel()
        factor = (params["a"] @ params["b"]).astype(layer.dtype)
        x = x.astype(layer.dtype)
        if (rng is not None and drops(self.dropout)) or jnp.finfo(layer.dtype).bits < 32:
            # In bf16 1 + A·B would round back to 1 until A·B has grown to 2⁻⁹.
            return layer.base(x) + product(dropout(x, self.dropout, rng), kernel * factor)
        return layer.plus_bias(product(x, kernel * (jnp.ones((), layer.dtype) + factor)))

    def without_pruned(self, sites: Layers, masks: Layers) -> tuple[Self, Layers]:
        """Without the ranks that `masks` prune as a whole."""
        return without_pruned_ranks(self, sites, masks)
