"""LoRA on a pruned base: W = W₀ + s·(A·B) ⊙ (W₀ ≠ 0), so that the merged layer has the zeros of the base.

Huang et al. 2025 (LoSA, arXiv 2502.14816) and Muñoz et al. 2024 (SQFT's SparsePEFT, arXiv 2410.03750) mask the product of a LoRA
by its base's zeros while they train. This is that mask and nothing else of theirs: LoSA also prunes the base layer by layer and
chooses ranks; here the base is pruned already.

Cost: the mask needs the `[d_in, d_out]` product, as HiRA does. With N = d_in·d_out a step takes about 6N FLOPs per token at an adapted
layer instead of LoRA's 4N, and 2·r·N for A·B. A plain LoRA that is merged with its zeros put back costs nothing in training
and drops a part of the update (`jaxpeft.pruning.base_zeros`).

On a quantised base the zeros are those of the stored weights. A weight that was rounded to zero (NF4's code 7) is one of them: the
merged layer is then as sparse as the base that was trained on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import FrozenLayer, SiteParams, in_dtype
from jaxpeft.adapters.products import product


def masked_update(frozen_kernel: jax.Array, params: SiteParams) -> jax.Array:
    """(A·B) ⊙ (W₀ ≠ 0): `[d_in, d_out]` in fp32, exactly zero at the zeros of `frozen_kernel`."""
    return jnp.where(frozen_kernel != 0, params["a"] @ params["b"], 0)


def forward(
    x: jax.Array,
    dropped: jax.Array | None,
    params: SiteParams,
    scaling: float,
    layer: FrozenLayer,
) -> jax.Array:
    """x·W₀ + s·x_d·((A·B) ⊙ (W₀ ≠ 0)), with the layer's bias and without a bias on B.

    Args:
        x: the layer's input, or ids.
        dropped: x after dropout; None without dropout. Then fp32 takes one product with the sum of both kernels.
        params: `a` and `b`.
        scaling: s.
        layer: the frozen layer.
    """
    # The zeros of the weights as they are stored: a cast to bf16 could make more.
    frozen_kernel = layer.weights(jnp.float32)
    if layer.is_embedding:
        delta = product(layer.times(x, params["a"]), params["b"].astype(layer.dtype))
        return layer.base(x) + in_dtype(scaling, delta) * delta * layer.times(x, frozen_kernel != 0)
    update = (scaling * masked_update(frozen_kernel, params)).astype(layer.dtype)
    if dropped is not None or jnp.finfo(layer.dtype).bits < 32:
        # In bf16 W₀ + update would lose the digits of a small update.
        return layer.base(x) + product(x if dropped is None else dropped, update)
    return layer.plus_bias(product(x, layer.kernel() + update))
