"""Merges frozen base, adapters and masks into plain parameters, and undoes it. No other file joins the trees."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp

from jaxpeft.adapters.base import Method, SiteMethod, SiteParams, check_masks
from jaxpeft.errors import InputError
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
) -> Params:
    """Return the parameters of a plain model that computes the same as the adapted one.

    Quantised kernels are merged into their dequantised fp32 values, and all of them are returned dense. With `requantize` they
    stay quantised: the merged ones are quantised again, which loses accuracy, and a UserWarning says so. Every other leaf keeps its
    dtype. Kernels are merged in fp32 and cast back once. `frozen` is not changed.

    An adapted embedding is merged like a kernel. If a decoder is tied to it, merging changes the decoder too, and the adapter did
    not. Do not merge such a model.

    Raises:
        InputError: if a merged kernel or a fully trained leaf is not finite, or if the method changes more than weights
            (prompt tuning).
    """
    constants = constants_of(frozen)
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
        _merge_layer(leaves, path, own, method.at(path), requantize)
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


def _merge_layer(leaves: dict, path: str, params: SiteParams, method: SiteMethod, requantize: bool) -> None:
    kernel_path = f"{path}/kernel" if f"{path}/kernel" in leaves else f"{path}/embedding"
    kernel, bias = leaves[kernel_path], leaves.get(f"{path}/bias")
    dense = dequantize(kernel) if is_quantized(kernel) else kernel.astype(jnp.float32)
    # An accelerator's default precision would round A·B to bf16.
    with jax.default_matmul_precision("highest"):
        merged = method.kernel(dense, params)
    new_bias = method.adapted_bias(None if bias is None else bias.astype(jnp.float32), params)
    for value in (merged, new_bias):
        if value is not None and not bool(jnp.isfinite(value).all()):
            raise InputError(f"the merged layer {path} is not finite: the adapter's values have diverged")
    if is_quantized(kernel):
        leaves[kernel_path] = quantize_like(kernel, merged) if requantize else merged
    else:
        leaves[kernel_path] = merged.astype(kernel.dtype)
    if bias is not None and new_bias is not None:
        leaves[f"{path}/bias"] = new_bias.astype(bias.dtype)
