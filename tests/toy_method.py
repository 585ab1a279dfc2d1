"""A method as somebody might add it: this file, and a line in `jaxpeft.adapters.METHODS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Description, FrozenLayer, Site, SiteMethod, SiteParams


@dataclass(frozen=True)
class Toy(SiteMethod):
    """W = W₀ + gamma·u·v, rank one."""

    name: ClassVar[str] = "toy-rank-one"
    description: ClassVar[Description] = Description(
        title="Toy", equation="W = W₀ + γ·uv", source="Nobody 2026", advice="never"
    )
    prunable: ClassVar[tuple[str, ...]] = ("u", "v")
    undecayed: ClassVar[tuple[str, ...]] = ("v",)
    default_role: ClassVar[str | None] = "attention_qv"
    shareable: ClassVar[tuple[str, ...]] = ("gamma",)
    gamma: float = 1.0
    marks: tuple[str, ...] = ()

    def init(self, rng: jax.Array, site: Site, kernel: Callable[[], jax.Array]) -> SiteParams:
        return {"u": jax.random.normal(rng, (site.d_in, 1)), "v": jnp.zeros((1, site.d_out), jnp.float32)}

    def kernel(self, frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
        return frozen_kernel + self.gamma * params["u"] @ params["v"]

    def forward(self, x: jax.Array, params: SiteParams, layer: FrozenLayer, rng: jax.Array | None) -> jax.Array:
        h = layer.times(layer.cast(x), params["u"])
        return layer.base(x) + self.gamma * layer.times(h, params["v"])
