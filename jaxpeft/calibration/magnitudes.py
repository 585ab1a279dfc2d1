"""The mean size of every input of a layer, by which S²FT can choose heads and channels (Yang et al. 2024, arXiv 2412.06289)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters import Site
from jaxpeft.calibration.components import record_inputs
from jaxpeft.errors import InputError
from jaxpeft.models.build import Model
from jaxpeft.trees import Params


def input_magnitudes(
    model: Model, targets: Mapping[str, Site], batches: Collection[Mapping[str, Any]], *, needed_by: str
) -> dict[str, jax.Array]:
    """The mean |x| of each input of the `targets` over all tokens that `attention_mask` covers: `[d_in]` in fp32, by layer.

    Args:
        model: the base, run without dropout. Its kernels may be quantised.
        targets: linear layers, by path. A layer whose input has rows instead of tokens (a pooler) counts all rows.
        batches: at least one batch, as `jaxpeft.data` makes them.
        needed_by: the method that needs the magnitudes, for messages.

    Raises:
        InputError: there are no batches.
    """
    if not len(batches):
        raise InputError(f"{needed_by} needs at least one batch, got none; set adapter.calibration_batches")

    @jax.jit
    def sums(params: Params, batch: dict[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
        inputs = record_inputs(model.module, params, targets, **model.inputs(batch))
        mask = jnp.asarray(batch["attention_mask"])
        return {path: _sum(x, mask > 0) for path, x in inputs.items()}

    totals: dict[str, Any] = {}
    for batch in batches:
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        found = sums(model.params, tokens)
        totals = jax.tree.map(jnp.add, totals, found) if totals else found
    return {path: totals[path][0] / totals[path][1] for path in targets}


def _sum(x: jax.Array, counted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of |x| over the counted tokens, `[d_in]`, and their number."""
    size = jnp.abs(x.astype(jnp.float32))
    if x.ndim < 3:
        return size.sum(axis=0), jnp.float32(x.shape[0])
    return jnp.where(counted[..., None], size, 0).sum(axis=(0, 1)), counted.sum().astype(jnp.float32)
