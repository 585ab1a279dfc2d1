"""The mean gradient with respect to frozen kernels: LoRA-GA's statistics (Wang et al. 2024, arXiv 2407.05000, section 3.3).

SHiRA and S²FT can choose by it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters import Site
from jaxpeft.errors import InputError
from jaxpeft.quantization import is_quantized
from jaxpeft.trees import Params, leaf_paths, nest


def kernel_gradients(
    loss: Callable[[Params, Mapping[str, Any]], jax.Array],
    params: Params,
    targets: Mapping[str, Site],
    batches: Collection[Mapping[str, Any]],
    *,
    needed_by: str = "LoRA-GA",
) -> dict[str, jax.Array]:
    """The gradient `[d_in, d_out]` in fp32 with respect to the kernel of each linear target, by layer.

    As in PEFT's `preprocess_loraga`, it is the mean over the batches of each batch's own gradient. Embeddings get none.
    `loss` decides whether dropout is on; PEFT leaves it on.

    Args:
        loss: maps parameters and a batch to the mean loss in fp32, a scalar.
        params: the model's parameters, nested. Only the kernels of linear targets get gradients.
        targets: the layers, by path.
        batches: at least one batch.
        needed_by: the method that needs the gradients, for messages.

    Raises:
        InputError: there are no batches, or a target is stored quantised.
    """
    if not len(batches):
        raise InputError(f"{needed_by} needs at least one batch, got none; set adapter.calibration_batches")
    paths = {path: f"{path}/kernel" for path, site in targets.items() if site.kind == "linear"}
    leaves = leaf_paths(params)
    for path, leaf in paths.items():
        if is_quantized(leaves[leaf]):
            raise InputError(
                f"layer {path} is stored quantised, but {needed_by} needs its gradient: do not quantise the base"
            )
    # Only these are differentiated, so no memory goes to gradients of other leaves.
    kernels = {leaf: leaves.pop(leaf) for leaf in paths.values()}

    @jax.jit
    def gradient(kernels: Params, others: Params, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        return jax.grad(lambda kernels: loss(nest({**others, **kernels}), batch))(kernels)

    total = {leaf: jnp.zeros(kernel.shape, jnp.float32) for leaf, kernel in kernels.items()}
    for batch in batches:
        found = gradient(kernels, leaves, dict(batch))
        total = {leaf: total[leaf] + found[leaf].astype(jnp.float32) for leaf in total}
    return {path: total[leaf] / len(batches) for path, leaf in paths.items()}
