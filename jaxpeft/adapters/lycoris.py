"""The common part of LoHa and LoKr, the methods of LyCORIS (Yeh et al. 2023, arXiv 2309.14859): scaling, patterns, dropouts.

They have no dropout on the adapter's input. They have two others, in training only:

- `rank_dropout`: the rate at which outputs of the adapter are set to zero, the same ones for the whole batch. The name is
  LyCORIS's and PEFT's; it drops rows of the update in torch's layout, not ranks.
- `module_dropout`: the rate at which a layer runs without its adapter, for the whole batch. Nothing is scaled up for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import SiteMethod, with_patterns
from jaxpeft.errors import InputError


@dataclass(frozen=True)
class Lycoris(SiteMethod):
    """A method whose update is scaled by alpha/rank; the rank may exceed a layer's width."""

    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    def __post_init__(self) -> None:
        for option in ("rank_dropout", "module_dropout"):
            if not 0 <= (rate := getattr(self, option)) < 1:
                raise InputError(f"adapter.{option} is {rate}; it must be at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """The factor s on the update."""
        return self.alpha / self.rank

    @property
    def uses_rng(self) -> bool:
        """True if one of the dropouts is on."""
        return bool(self.rank_dropout or self.module_dropout)

    def at(self, path: str) -> Self:
        """The method with the rank and alpha of the first pattern that matches `path`."""
        return with_patterns(self, path)

    def dropped(self, y: jax.Array, rng: jax.Array | None, *, rescaled: bool) -> jax.Array:
        """The adapter's output `y: [..., d_out]` after the dropouts; unchanged if `rng` is None.

        With `rescaled`, the outputs that are kept are divided by their share. If none is kept, the adapter adds nothing; PEFT
        then divides zero by zero.
        """
        if rng is None:
            return y
        key_rank, key_module = jax.random.split(rng)
        if self.rank_dropout:
            width = y.shape[-1]
            keep = jax.random.bernoulli(key_rank, 1 - self.rank_dropout, (width,)).astype(jnp.float32)
            y = y * (keep / jnp.maximum(keep.mean(), 1 / width) if rescaled else keep).astype(y.dtype)
        if self.module_dropout:
            y = jnp.where(jax.random.bernoulli(key_module, 1 - self.module_dropout), y, jnp.zeros((), y.dtype))
        return y
