"""What an adapter method is: the contract every file in this folder fulfils.

A method states its meaning once, as a pure function of weights: `kernel(frozen_kernel, params)`. Merging uses it, and
the tests use it as the oracle for `forward`, the way the same layer is computed in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

SiteParams = dict[str, jax.Array]
"""One site's adapter parameters: name → array."""


@dataclass(frozen=True)
class Site:
    """A linear layer that can be adapted: its layer path and its kernel's axes `[d_in, d_out]`."""

    path: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class FrozenLinear:
    """The frozen layer at a site, as `forward` sees it.

    `base` maps x: [..., d_in] to x·W₀ + bias: [..., d_out]; `kernel` returns W₀: [d_in, d_out] in the compute dtype
    (dequantised where the base is stored in 4 bits); `bias`: [d_out] or None.
    """

    base: Callable[[jax.Array], jax.Array]
    kernel: Callable[[], jax.Array]
    bias: jax.Array | None
    dtype: Any


Dropout = Callable[[jax.Array], jax.Array] | None
"""Dropout for an adapter's input, or None where there is none (evaluation, or rate 0)."""


class Method(Protocol):
    """One way to adapt a linear layer; implementations are frozen dataclasses."""

    name: ClassVar[str]

    @property
    def dropout(self) -> float:
        """Rate of dropout on the adapter's input."""

    def init(self, rng: jax.Array, site: Site) -> SiteParams:
        """Parameters in fp32 for which the layer computes exactly what it did before."""

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        """The adapted kernel `[d_in, d_out]`: what the method means."""

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLinear, dropout: Dropout) -> jax.Array:
        """The adapted layer on x: [..., d_in], in the layer's dtype: how the method trains."""


def low_rank_init(rng: jax.Array, site: Site, rank: int) -> SiteParams:
    """A ~ U(±1/√d_in) as `a: [d_in, rank]`, and `b: [rank, d_out]` = 0, fp32.

    PEFT's default: Kaiming-uniform with a = √5, which is √(6 / ((1 + 5)·d_in)). Many JAX ports use ±√(6/d_in), 2.45 times as much.
    """
    bound = site.d_in**-0.5
    a = jax.random.uniform(rng, (site.d_in, rank), jnp.float32, -bound, bound)
    return {"a": a, "b": jnp.zeros((rank, site.d_out), jnp.float32)}
