"""Merges frozen base, adapters and masks into plain parameters, and undoes it. No other file joins the trees."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Method, SiteMethod, SiteParams, check_masks
from jaxpeft.errors import InputError
from jaxpeft.pruning.base_zeros import KeptZeros, cost_of_zeros, keep_zeros
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.quantization import dequantize, is_quantized, quantize_like
from jaxpeft.trees import Adapters, Layers, Params, by_leaf, constants_of, join, leaf_paths, nest, without_shared


def merge(
    frozen: Params,
    adapters: Adapters,
    method: Method | None = None,
    *,
    masks: Layers | None = None,
    requantize: bool = False,
    keep_sparsity: bool = False,
) -> Params:
    """Return the parameters of a plain model that computes the same as the adapted one.

    Quantised kernels are merged into their dequantised fp32 values, and all of them are returned dense. With `requantize` they
    stay quantised: the merged ones are quantised again, which loses accuracy, and a UserWarning says so. Every other leaf keeps its
    dtype. Kernels are merged in fp32 and cast back once. `frozen` is not changed.

    With `keep_sparsity`, an adapted matrix is zero wherever the base's is. That drops a part of the update: `dropped_updates` says
    how much. On a quantised base, weights that were rounded to zero are zeros too.

    An adapted embedding is merged like a kernel. If a decoder is tied to it, merging changes the decoder too, and the adapter did
    not. Do not merge such a model.

    Raises:
        InputError: if a merged kernel or a fully trained leaf is not finite, or if the method changes more than weights
            (prompt tuning), or if `keep_sparsity` is set and no adapted matrix of the base has a zero.
    """
    constants = constants_of(frozen, masks)
    if keep_sparsity:
        check_has_zeros(frozen, adapters["sites"], "keep_sparsity")
    frozen, shared = without_shared(frozen)
    leaves = leaf_paths(join(frozen, adapters["modules"]))
    check_masks(method, masks)
    sites = apply_masks(adapters["sites"], masks or {})
    if requantize and any(is_quantized(leaves.get(f"{path}/kernel")) for path in sites):
        warnings.warn(
            "merging into a quantised base quantises the sum again, which loses accuracy; merge into fp32 if it matters",
            stacklevel=2,
        )
    for path, leaf in by_leaf(adapters["modules"]).items():
        if not bool(jnp.isfinite(leaf).all()):
            raise InputError(f"the trained {path} is not finite: its values have diverged")
    for path, params in sites.items():
        assert isinstance(method, SiteMethod), "adapters at sites need the method they belong to"
        own = {**shared, **constants.get(path, {}), **params}
        _merge_layer(leaves, path, own, method.at(path), requantize, keep_sparsity)
    if not requantize:
        leaves = {path: dequantize(leaf) if is_quantized(leaf) else leaf for path, leaf in leaves.items()}
    return nest(leaves)


def unmerge(merged: Params, frozen: Params, adapters: Adapters) -> Params:
    """Undo `merge` bit for bit: return `merged` with the base's own leaves at every merged layer.

    Subtracting the update would not restore the base, because the sum was rounded. So the replaced leaves, quantised kernels too,
    are taken from `frozen`, the base that was merged. `frozen` lacks fully trained leaves: they stay as in `merged`.
    """
    base = leaf_paths(without_shared(frozen)[0])
    touched = {
        path for path, leaf in base.items() if is_quantized(leaf) or path.rpartition("/")[0] in adapters["sites"]
    }
    return nest({path: base[path] if path in touched else leaf for path, leaf in leaf_paths(merged).items()})


def dropped_updates(
    frozen: Params, adapters: Adapters, method: Method | None = None, *, masks: Layers | None = None
) -> dict[str, KeptZeros]:
    """For every adapted layer, the part of its update that `merge` drops with `keep_sparsity`."""
    constants = constants_of(frozen, masks)
    frozen, shared = without_shared(frozen)
    leaves = leaf_paths(frozen)
    found = {}
    for path, params in apply_masks(adapters["sites"], masks or {}).items():
        assert isinstance(method, SiteMethod), "adapters at sites need the method they belong to"
        dense = _dense(leaves[_matrix(leaves, path)])
        own = {**shared, **constants.get(path, {}), **params}
        found[path] = cost_of_zeros(dense, _merged(dense, own, method.at(path)))
    return found


def check_has_zeros(frozen: Params, sites: Iterable[str], option: str) -> float:
    """The share of zeros in the matrices of `frozen` at the layers `sites`.

    Raises:
        InputError: if there is none. The message has `option`, the setting that asks for zeros.
    """
    leaves = leaf_paths(without_shared(frozen)[0])
    kernels = [leaves[_matrix(leaves, path)] for path in sites]
    num_zeros = sum(int((_dense(kernel) == 0).sum()) for kernel in kernels)
    if not num_zeros:
        raise InputError(
            f"{option} keeps the zeros of a pruned base, and no adapted layer of this base has any; leave it out"
        )
    return num_zeros / sum(kernel.size for kernel in kernels)


def _matrix(leaves: Mapping[str, Any], path: str) -> str:
    return f"{path}/kernel" if f"{path}/kernel" in leaves else f"{path}/embedding"


def _dense(kernel: Any) -> jax.Array:
    return dequantize(kernel) if is_quantized(kernel) else jnp.asarray(kernel, jnp.float32)


def _merged(dense: jax.Array, params: SiteParams, method: SiteMethod) -> jax.Array:
    # An accelerator's default precision would round A·B to bf16.
    with jax.default_matmul_precision("highest"):
        return method.kernel(dense, params)


def _merge_layer(
    leaves: dict, path: str, params: SiteParams, method: SiteMethod, requantize: bool, keep_sparsity: bool
) -> None:
    kernel_path = _matrix(leaves, path)
    kernel, bias = leaves[kernel_path], leaves.get(f"{path}/bias")
    dense = _dense(kernel)
    merged = _merged(dense, params, method)
    new_bias = method.adapted_bias(None if bias is None else bias.astype(jnp.float32), params)
    for value in (merged, new_bias):
        if value is not None and not bool(jnp.isfinite(value).all()):
            raise InputError(f"the merged layer {path} is not finite: the adapter's values have diverged")
    if keep_sparsity:
        merged = keep_zeros(dense, merged)
    if is_quantized(kernel):
        leaves[kernel_path] = quantize_like(kernel, merged) if requantize else merged
    else:
        leaves[kernel_path] = merged.astype(kernel.dtype)
    if bias is not None and new_bias is not None:
        leaves[f"{path}/bias"] = new_bias.astype(bias.dtype)
