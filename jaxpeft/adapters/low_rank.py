"""How thin matrices are drawn: the initialisation of LoRA and HiRA, LoRA's orthogonal one, and the distribution that others share."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Site, SiteParams, check_rank
from jaxpeft.errors import InputError

Start = bool | Literal["gaussian"]


def init_low_rank(rng: jax.Array, site: Site, rank: int, start: Start = True) -> SiteParams:
    """`a: [d_in, rank]` and `b: [rank, d_out]` in fp32, as PEFT draws them.

    Args:
        rng: key of the draw.
        site: the layer. For an embedding, `a` is zero and `b` ~ N(0, 1), unless `start` is False.
        rank: r, from 1 to the layer's width.
        start: True: A ~ U(±1/√d_in), B = 0. "gaussian": A ~ N(0, (1/r)²), B = 0. False: neither is zero, for tests.

    Raises:
        InputError: if the rank exceeds the layer's width, or `start` is unknown.
    """
    check_rank(rank, site)
    key_a, key_b = jax.random.split(rng)
    shape_a, shape_b = (site.d_in, rank), (rank, site.d_out)
    if start is False:
        if site.kind == "embedding":
            return {"a": jax.random.normal(key_a, shape_a), "b": jax.random.normal(key_b, shape_b)}
        return {"a": kaiming(key_a, shape_a, site.d_in), "b": kaiming(key_b, shape_b, rank)}
    if site.kind == "embedding":
        return {"a": jnp.zeros(shape_a, jnp.float32), "b": jax.random.normal(rng, shape_b)}
    if start is True:
        a = kaiming(rng, shape_a, site.d_in)
    elif start == "gaussian":
        a = jax.random.normal(rng, shape_a) / rank
    else:
        raise InputError(f"unknown initialisation '{start}'; it must be true, false or gaussian")
    return {"a": a, "b": jnp.zeros(shape_b, jnp.float32)}


def orthogonal(rng: jax.Array, site: Site, rank: int) -> SiteParams:
    """`a: [d_in, rank]` and `b: [rank, d_out]`, neither zero, with A·B = 0: they use orthogonal halves of the rank's space.

    A = X·Q₁/10, B = Q₂ᵀ·Y/10 with X, Y ~ N(0, 1) and Q₁, Q₂ the even and the odd rows of an orthogonal matrix (PEFT's
    "orthogonal", datta0.github.io/posts/rethink-lora-init). A·B is zero up to rounding, about 1e-9.

    Raises:
        InputError: if the rank is odd or exceeds the layer's width.
    """
    check_rank(rank, site)
    if rank % 2:
        raise InputError(
            f"the orthogonal initialisation splits the rank in two: give an even rank, not {rank} (layer {site.path})"
        )
    key_q, key_a, key_b = jax.random.split(rng, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank)))
    x = jax.random.normal(key_a, (site.d_in, rank // 2))
    y = jax.random.normal(key_b, (rank // 2, site.d_out))
    times = partial(jnp.matmul, precision="highest")  # a TPU's default would round A and B, and A·B would not be zero
    return {"a": times(x, q[0::2]) / 10, "b": times(q[1::2].T, y) / 10}


def kaiming(rng: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """U(±1/√fan_in) in fp32: torch's `kaiming_uniform_` with a = √5, which is √(6 / ((1 + 5)·fan_in)).

    PEFT initialises a linear adapter so. Many JAX ports use ±√(6/fan_in), which is 2.45 times as wide.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)
