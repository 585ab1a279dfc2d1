"""Estimators of a frozen layer's outputs: its kernel at rank 8, and the size of what that leaves out.

The factors are those of the kernel's singular value decomposition, `u·√s` and `√s·vᵀ` (Khaki et al. 2025, section 4.2). No data is
needed. They are computed once and kept beside the base, as frozen arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters.lora_init.weight_driven import randomized_svd
from jaxpeft.families import required
from jaxpeft.families.base import Projections
from jaxpeft.models.build import Model
from jaxpeft.quantization import dequantize, is_quantized
from jaxpeft.trees import Layers, below, leaf_paths

ESTIMATED = ("query", "key", "value", "intermediate")
"""The projections whose outputs are estimated."""


def projection_paths(model: Model, number: int) -> dict[str, str]:
    """Projection (`families.base.Projections`) → layer path, in the encoder layer `number`.

    Raises:
        InputError: if the model's family does not say what its projections are.
    """
    paths: Projections = required(model.family, "projections", "contextual sparsity")
    return {
        name: below(model.base_prefix, path.format(number=number))
        for name, path in vars(paths).items()
        if name != "activation"
    }


def dense_weights(leaves: Mapping[str, Any], path: str) -> tuple[jax.Array, jax.Array | None]:
    """The kernel `[d_in, d_out]` of the layer `path` in float32, dequantised if it is stored quantised, and its bias or None."""
    leaf = leaves[f"{path}/kernel"]
    kernel = dequantize(leaf) if is_quantized(leaf) else jnp.asarray(leaf, jnp.float32)
    return kernel, leaves.get(f"{path}/bias")


def activation_of(model: Model) -> Callable[[Any], Any]:
    """The function between the two feed-forward layers of `model`."""
    from transformers.modeling_flax_utils import ACT2FN

    paths: Projections = required(model.family, "projections", "contextual sparsity")
    functions: dict[str, Any] = ACT2FN
    function: Callable[[Any], Any] = functions[getattr(model.config, paths.activation)]
    return function


def make_estimators(model: Model, layers: Iterable[int], *, rank: int = 8) -> Layers:
    """The estimators of the encoder `layers` (by number) of `model`: layer path → the arrays of `estimate_kernel`.

    Raises:
        InputError: if the model's family does not say what its projections are.
    """
    leaves = leaf_paths(model.params)
    found: Layers = {}
    for number in layers:
        paths = projection_paths(model, number)
        for name in ESTIMATED:
            dense, _ = dense_weights(leaves, paths[name])
            found[paths[name]] = {
                key: jnp.asarray(value) for key, value in estimate_kernel(np.asarray(dense), rank=rank).items()
            }
    return found


def estimator_shapes(model: Model, layers: Iterable[int], *, rank: int = 8) -> Layers:
    """The shapes of `make_estimators`, as `jax.ShapeDtypeStruct`. The parameters of `model` may be shapes."""
    leaves = leaf_paths(model.params)
    found: Layers = {}
    for number in layers:
        paths = projection_paths(model, number)
        for name in ESTIMATED:
            d_in, d_out = leaves[f"{paths[name]}/kernel"].shape
            r = min(rank, d_in, d_out)
            shapes = {"u": (d_in, r), "v": (r, d_out), "rest": (d_out,)}
            found[paths[name]] = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    return found


def estimate_kernel(kernel: np.ndarray, *, rank: int) -> Mapping[str, np.ndarray]:
    """The estimator of `kernel: [d_in, d_out]`, in float32.

    Returns:
        `u: [d_in, rank]` and `v: [rank, d_out]`, whose product is the best approximation of that rank, and `rest: [d_out]`, the sums
        of squares of the columns of kernel − u·v.
    """
    rank = min(rank, *kernel.shape)
    # Twice the rank as a sketch, and four power iterations: the factors agree with the exact ones to about 1e-4.
    sketch = np.random.default_rng(0).standard_normal((min(kernel.shape), min(2 * rank, *kernel.shape)), np.float32)
    left, values, right = randomized_svd(kernel, sketch, rounds=4)
    root = np.sqrt(values[:rank])
    u, v = left[:, :rank] * root, root[:, None] * right[:rank]
    # ‖w − ŵ‖² = ‖w‖² − ‖ŵ‖² for a projection; the difference of squares would lose digits.
    return {"u": u, "v": v, "rest": np.square(kernel - u @ v).sum(0)}
