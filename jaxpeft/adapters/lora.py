"""LoRA: y = x·W₀ + s·dropout(x)·A·B, with s = alpha/rank (Hu et al. 2021, arXiv 2106.09685, section 4.1).

Differs from the paper: A is drawn as PEFT draws it (uniform, ±1/√d_in), not normal. Matrices are stored as Flax
kernels, `a: [d_in, r]` and `b: [r, d_out]`: the transposes of PEFT's `lora_A` and `lora_B`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax

from jaxpeft.adapters.contract import Dropout, FrozenLinear, Site, SiteParams, low_rank_init


@dataclass(frozen=True)
class Lora:
    """Low-rank adaptation; `dropout` is the rate on the adapter's input only."""

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """The factor s on A·B."""
        return self.alpha / self.rank

    def init(self, rng: jax.Array, site: Site) -> SiteParams:
        """`a: [d_in, rank]` uniform, `b: [rank, d_out]` zero."""
        return low_rank_init(rng, site, self.rank)

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + s·A·B."""
        return frozen_kernel + self.scaling * (params["a"] @ params["b"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLinear, dropout: Dropout) -> jax.Array:
        """The side path: two thin products, never a `[d_in, d_out]` one."""
        h = x.astype(layer.dtype) if dropout is None else dropout(x.astype(layer.dtype))
        # Cast first: an fp32 adapter would promote a bf16 layer's output, and with it every layer above.
        delta = (h @ params["a"].astype(layer.dtype)) @ params["b"].astype(layer.dtype)
        return layer.base(x) + self.scaling * delta
