"""HiRA: W = W₀ + W₀ ⊙ (A·B), a high-rank update from a low-rank product (Huang et al., ICLR 2025, section 3.2).

There is no alpha and no scaling. Unlike LoRA it needs the product with a full `[d_in, d_out]` matrix in training, about
6N FLOPs a token at an adapted layer instead of 4N, and it wants a far larger learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.adapters.contract import Dropout, FrozenLinear, Site, SiteParams, low_rank_init


@dataclass(frozen=True)
class Hira:
    """Hadamard high-rank adaptation; `dropout` is the rate on the adapter's input only."""

    name: ClassVar[str] = "hira"
    rank: int = 32
    dropout: float = 0.0

    def init(self, rng: jax.Array, site: Site) -> SiteParams:
        """`a: [d_in, rank]` uniform, `b: [rank, d_out]` zero."""
        return low_rank_init(rng, site, self.rank)

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + W₀ ⊙ (A·B)."""
        return frozen_kernel + frozen_kernel * (params["a"] @ params["b"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLinear, dropout: Dropout) -> jax.Array:
        """One product with W₀ ⊙ (1 + A·B) without dropout; base and delta apart with it."""
        kernel = layer.kernel()
        factor = (params["a"] @ params["b"]).astype(layer.dtype)
        x = x.astype(layer.dtype)
        if dropout is not None:
            return layer.base(x) + dropout(x) @ (kernel * factor)
        y = x @ (kernel * (jnp.ones((), layer.dtype) + factor))
        return y if layer.bias is None else y + layer.bias.astype(layer.dtype)
