"""Frozen base + adapters + masks → plain parameters: the only place that joins the trees."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpeft.adapters.contract import Method
from jaxpeft.paths import Adapters, Layers, Params, join, leaf_paths, nest
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.quant.nf4 import Nf4Tensor, dequantize


def merge(frozen: Params, adapters: Adapters, method: Method | None = None, *, masks: Layers | None = None) -> Params:
    """Return the parameters of a plain model that computes what the adapted one does.

    4-bit kernels are merged into their dequantised fp32 values: quantising the sum again would lose accuracy. Every
    other leaf keeps its dtype; kernels are merged in fp32 and cast back once.

    Raises:
        ValueError: where a merged kernel is not finite.
    """
    leaves = leaf_paths(join(frozen, adapters["modules"]))
    leaves = {k: dequantize(leaf) if isinstance(leaf, Nf4Tensor) else leaf for k, leaf in leaves.items()}
    for path, params in apply_masks(adapters["sites"], masks or {}).items():
        assert method is not None, "adapters at sites need the method they belong to"
        kernel = leaves[f"{path}/kernel"]
        merged = method.kernel(kernel.astype(jnp.float32), params)
        if not bool(jnp.isfinite(merged).all()):
            raise ValueError(f"the merged kernel of {path} is not finite: the adapter's values have diverged")
        leaves[f"{path}/kernel"] = merged.astype(kernel.dtype)
    return nest(leaves)
