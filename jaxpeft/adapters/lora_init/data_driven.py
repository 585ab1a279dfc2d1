"""LoRA from data: EVA and LoRA-GA. `jaxpeft.calibration` measures the statistics they need.

    EVA       A = the first r principal directions of the layer's inputs, B = 0      Paischer et al. 2024, arXiv 2410.07170, section 3
    LoRA-GA   ∂loss/∂W = U·S·V;  A = r directions of U, B = other r of S·V, scaled;  W becomes W − s·A·B
                                                                                      Wang et al. 2024, arXiv 2407.05000, theorem 3.1

As in PEFT and unlike LoRA-GA's paper, B is multiplied by its singular values, and "stable" scales only B, by d_out^¼ / √gamma.
The gradient's SVD is exact; PEFT's is randomised (`svd_lowrank` of 4r directions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.base import Site, SiteParams
from jaxpeft.errors import InputError


def eva(components: jax.Array, site: Site, rank: int) -> SiteParams:
    """A from `components: [d_in, rank]` and B = 0, a no-op.

    Raises:
        InputError: if the components are not those of this layer and rank.
    """
    if components.shape != (site.d_in, rank):
        raise InputError(
            f"the components measured at layer {site.path} have shape {list(components.shape)}, and its A is [{site.d_in}, {rank}]: "
            "give init_adapters the method that jaxpeft.calibration returned with them"
        )
    return {"a": jnp.asarray(components, jnp.float32), "b": jnp.zeros((rank, site.d_out), jnp.float32)}


def lora_ga(
    rng: jax.Array,
    gradient: np.ndarray,
    site: Site,
    rank: int,
    scaling: float,
    kernel: Callable[[], jax.Array],
    options: dict[str, Any],
) -> SiteParams:
    """A and B from the first 2·rank singular vectors of `gradient: [d_in, d_out]`.

    A and B use different vectors, unless `direction` is "random".

    Raises:
        InputError: if the gradient has another shape or is not finite, or the rank exceeds half of the layer's width.
    """
    if gradient.shape != (site.d_in, site.d_out) or not np.isfinite(gradient).all():
        raise InputError(
            f"the gradient measured at layer {site.path} has shape {list(gradient.shape)} or values that are not finite; its kernel is "
            f"[{site.d_in}, {site.d_out}]"
        )
    width = min(site.d_in, site.d_out)
    if 2 * rank > width:
        raise InputError(
            f"LoRA-GA needs 2·rank directions, and layer {site.path} has {width}: give a rank of at most {width // 2}, not {rank}"
        )
    u, s, vh = np.linalg.svd(np.asarray(gradient, np.float32), full_matrices=False)
    of_a, of_b = _directions(rng, options["direction"], rank)
    a, b, sizes = u[:, of_a], s[of_b, None] * vh[of_b], s[of_b]
    scale = options["scale"]
    if scale == "stable":
        b = b * (site.d_out**0.25 / options["stable_gamma"] ** 0.5)
    elif scale == "weight_svd" and sizes[0] > 0:
        b = b * (np.linalg.norm(np.asarray(kernel()), 2) / sizes[0])
    elif scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


def _directions(rng: jax.Array, direction: str, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the singular vectors for A and for B."""
    first, second = np.arange(rank), np.arange(rank, 2 * rank)
    if direction == "ArBr":
        return 2 * first + 1, 2 * first
    if direction == "A2rBr":
        return second, first
    if direction == "ArB2r":
        return first, second
    drawn = np.asarray(jax.random.permutation(rng, 2 * rank)[:rank])
    return drawn, drawn
