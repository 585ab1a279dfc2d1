"""The only interceptor: runs a Flax module with adapters at its linear layers, without editing the module.

Call `apply` and `discover_sites` inside or outside `jax.jit`, but never open an interceptor around a function that is
already jitted: jit's cache does not see it, and a warm program would run unadapted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapters.contract import Dropout, FrozenLinear, Method, Site, SiteParams
from jaxpeft.errors import InputError, near
from jaxpeft.paths import Adapters, Layers, Params, join, leaf_paths, nest
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.quant.nf4 import Nf4Tensor, dequantize
from jaxpeft.quant.recompute import recomputed


def discover_sites(module: nn.Module, params: Params, **inputs: Any) -> dict[str, Site]:
    """Return the linear layers that a call of `module` on `inputs` visits, by layer path, in the order of the calls.

    Nothing is computed (`jax.eval_shape`); `params` may be arrays or shapes. A decoder tied to the embeddings has no
    kernel of its own and is not a site.

    Raises:
        InputError: for a module scanned over its layers: there one path stands for all of them.
    """
    leaves = leaf_paths(params)
    sites: dict[str, Site] = {}

    def record(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if _is_linear_call(context) and f"{path}/kernel" in leaves:
            shape = leaves[f"{path}/kernel"].shape
            if len(shape) != 2:
                raise InputError(
                    f"layer {path} has a kernel of shape {shape}: a model scanned over its layers has one path for "
                    "all of them and cannot be adapted; build it unscanned"
                )
            sites[path] = Site(path, *shape)
        return call(*args, **kwargs)

    def trace(dense: Params) -> Any:
        with nn.intercept_methods(record):
            return module.apply({"params": dense}, **inputs)

    # A 4-bit kernel is shown to the module as the matrix it stands for: Flax compares shapes.
    dense = nest({path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in leaves.items()})
    jax.eval_shape(trace, dense)
    return sites


def apply(
    module: nn.Module,
    frozen: Params,
    adapters: Adapters,
    method: Method | None = None,
    *,
    masks: Layers | None = None,
    dropout_rng: jax.Array | None = None,
    taps: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    **inputs: Any,
) -> Any:
    """Run `module` on `inputs` with `adapters` at their layers; return the module's own output.

    Args:
        module: any Flax linen module.
        frozen: its parameters, less those in `adapters["modules"]`; kernels may be `Nf4Tensor`s.
        adapters: `{"sites": …, "modules": …}` as `init_adapters` returns them.
        method: what the parameters at the sites mean; None where there are none.
        masks: by layer, like `adapters["sites"]`; bool, True = keep. Layers without a mask are dense.
        dropout_rng: key of the base's and the adapters' dropout; None evaluates without dropout.
        taps: layer path → function applied to the first argument of that module's call.
        **inputs: the module's keyword arguments.

    Raises:
        InputError: where an adapted layer was not visited by the call.
    """
    sites = apply_masks(adapters["sites"], masks or {})
    leaves = leaf_paths(join(frozen, adapters["modules"]))
    quantized = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Nf4Tensor)}
    params = nest({path: leaf for path, leaf in leaves.items() if path not in quantized})
    visited: set[str] = set()

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if taps and path in taps and context.method_name == "__call__":
            args = (taps[path](args[0]), *args[1:])
        tensor = quantized.get(f"{path}/kernel")
        if not _is_linear_call(context) or (tensor is None and path not in sites):
            return call(*args, **kwargs)
        visited.add(path)
        site = sites.get(path)
        drops = site is not None and method is not None and method.dropout and dropout_rng is not None
        # The layer's own key, folded from its path: the base's dropout draws what it did without adapters.
        key = context.module.make_rng("dropout") if drops else None
        return _run_layer(context.module, call, args[0], tensor, site, method, key)

    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    with nn.intercept_methods(intercept):
        out = module.apply({"params": params}, rngs=rngs, deterministic=dropout_rng is None, **inputs)
    for path in sites:
        if path not in visited:
            raise InputError(f"the adapter names layer '{path}', which the model never calls{near(path, visited)}")
    return out


def _is_linear_call(context: nn.module.InterceptorContext) -> bool:
    # The tied decoder is an unbound Dense with an empty path: never a site.
    return isinstance(context.module, nn.Dense) and context.method_name == "__call__" and bool(context.module.path)


def _dropout(rate: float, key: jax.Array | None) -> Dropout:
    if key is None:
        return None
    keep = 1.0 - rate
    return lambda x: jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, jnp.zeros((), x.dtype))


def _run_layer(
    module: nn.Module,
    call: Callable,
    x: jax.Array,
    tensor: Nf4Tensor | None,
    site: SiteParams | None,
    method: Method | None,
    dropout_key: jax.Array | None,
) -> jax.Array:
    """Run one linear layer: its base an array or in 4 bits (`tensor`), with an adapter (`site`) or without."""
    assert isinstance(module, nn.Dense)
    dtype = module.dtype or x.dtype
    bias: jax.Array | None = module.get_variable("params", "bias")

    def adapted(layer: FrozenLinear, x: jax.Array, site: SiteParams | None, key: jax.Array | None) -> jax.Array:
        if site is None:
            return layer.base(x)
        assert method is not None, "adapters at sites need the method they belong to"
        return method.forward(x, site, layer, _dropout(method.dropout, key))

    if tensor is None:
        kernel: jax.Array = module.get_variable("params", "kernel")
        return adapted(FrozenLinear(call, lambda: kernel.astype(dtype), bias, dtype), x, site, dropout_key)

    @recomputed
    def run(
        tensor: Nf4Tensor, key: jax.Array | None, x: jax.Array, bias: jax.Array | None, site: SiteParams | None
    ) -> jax.Array:
        kernel = dequantize(tensor, dtype)

        def base(x: jax.Array) -> jax.Array:
            y = x.astype(dtype) @ kernel
            return y if bias is None else y + bias.astype(dtype)

        return adapted(FrozenLinear(base, lambda: kernel, bias, dtype), x, site, key)

    return run(tensor, dropout_key, x, bias, site)
