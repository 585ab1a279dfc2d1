"""VeRA: y = x·W₀ + ((dropout(x)·A) ⊙ λ_d)·B ⊙ λ_b, A and B random, frozen and shared (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2).

Every layer learns the vectors λ_d: [r], initially `d_initial`, and λ_b: [d_out], initially zero. The paper shares A and B among
layers of one shape. Here, as in PEFT, one pair is as wide as the widest adapted layer, and each layer uses its first d_in rows of
`vera_a: [max d_in, r]` and its first d_out columns of `vera_b: [r, max d_out]`. The rank may exceed a layer's width. The pair is
kept in `frozen`. It depends only on the key and on the largest widths.

For the same `projection_prng_key` the pair equals torch's, bit for bit. So an adapter saved without it (`save_projection` false)
is as good as one saved with it, in jaxpeft and in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import (
    Description,
    FrozenLayer,
    SharesFactors,
    Site,
    SiteParams,
    dropout,
)


@dataclass(frozen=True)
class Vera(SharesFactors):
    """Vector-based random matrix adaptation; `dropout` is the rate on the adapter's input only."""

    name: ClassVar[str] = "vera"
    description: ClassVar[Description] = Description(
        title="VeRA",
        equation="y = xW₀ + (d ⊙ xA)B ⊙ b, A and B frozen and shared",
        source="Kopiczko et al. 2023, arXiv 2310.11454",
        advice="if many adapters are stored: only vectors train",
        peft="`VERA`, with its projections",
    )
    default_role: ClassVar[str | None] = "attention_qv"
    shareable: ClassVar[tuple[str, ...]] = ("dropout",)
    input_axes: ClassVar[Mapping[str, int]] = {"vera_a": 0}
    output_axes: ClassVar[Mapping[str, int]] = {"vera_b": 1, "lambda_b": 0}
    rank: int = 256
    dropout: float = 0.0
    d_initial: float = 0.1
    save_projection: bool = True
    projection_prng_key: int = 0
    init_weights: bool = True

    @property
    def saves_shared(self) -> bool:
        """True if a file holds the random factors; the key is enough to draw them again."""
        return self.save_projection

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        """`lambda_d: [rank]` = `d_initial` and `lambda_b: [d_out]` = 0. Without `init_weights` ~ N(0, 1) and = 1, for tests."""
        if not self.init_weights:
            return {"lambda_d": jax.random.normal(rng, (self.rank,)), "lambda_b": jnp.ones(site.d_out, jnp.float32)}
        return {
            "lambda_d": jnp.full(self.rank, self.d_initial, jnp.float32),
            "lambda_b": jnp.zeros(site.d_out, jnp.float32),
        }

    def init_shared(self, rng: jax.Array, sites: Mapping[str, Site]) -> SiteParams:
        """`vera_a: [max d_in, rank]` and `vera_b: [rank, max d_out]`, U(±√(6/fan_in)); `rng` is not used.

        fan_in is the one of PEFT's tensors: max d_in for A and the rank for B.
        """
        d_in, d_out = max(site.d_in for site in sites.values()), max(site.d_out for site in sites.values())
        words = np.frombuffer(
            np.random.RandomState(self.projection_prng_key).bytes(4 * self.rank * (d_in + d_out)),
            "<u4",
        )
        a, b = np.split(words, [self.rank * d_in])
        return {
            "vera_a": jnp.asarray(_kaiming_relu(a, d_in).reshape(self.rank, d_in).T),
            "vera_b": jnp.asarray(_kaiming_relu(b, self.rank).reshape(d_out, self.rank).T),
        }

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """W₀ + (A ⊙ λ_d)·(B ⊙ λ_b), with A and B cut to the layer's widths."""
        a, b = _factors(params, frozen_kernel.shape[0])
        return frozen_kernel + (a * params["lambda_d"]) @ (b * params["lambda_b"])

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        """The side path: two products through the rank, and two scalings of activations."""
        x = layer.cast(x)
        a, b = _factors(params, x.shape[-1])
        h = layer.times(dropout(x, self.dropout, rng), a) * params["lambda_d"].astype(layer.dtype)
        return layer.base(x) + layer.times(h, b) * params["lambda_b"].astype(layer.dtype)


def _factors(params: SiteParams, d_in: int) -> tuple[jax.Array, jax.Array]:
    """A and B cut to the layer's widths: `[d_in, r]` and `[r, d_out]`."""
    return params["vera_a"][:d_in], params["vera_b"][:, : params["lambda_b"].shape[0]]


def _kaiming_relu(words: np.ndarray, fan_in: int) -> np.ndarray:
    """PEFT's `_kaiming_init` from the generator's `words: [n]`: uniform within √3·gain/√fan_in with ReLU's gain √2.

    torch's CPU generator is the Mersenne twister, as in numpy's legacy generator. torch uses 24 bits of every word, and rounds
    u·(2·bound) − bound once.
    """
    bound = np.float32(math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(fan_in)))
    uniform = (words & 0xFFFFFF) * 2.0**-24
    return (uniform * np.float64(bound - -bound) - np.float64(bound)).astype(np.float32)
