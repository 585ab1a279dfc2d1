"""Runs a Flax module with adapters at its linear layers and embeddings, without editing the module.

This is the only file that intercepts calls. Use `apply` and `discover_sites` inside or outside `jax.jit`, but never open an
interceptor around a jitted function: jit's cache does not depend on it, so a program compiled before would run without adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.adapters.base import FrozenLayer, Method, Site, SiteMethod, SiteParams, check_masks
from jaxpeft.adapters.channels import Channels
from jaxpeft.adapters.channels import forward as forward_at
from jaxpeft.adapters.products import flat, product
from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.pruning.masks import apply_masks
from jaxpeft.quantization import QuantizedTensor, dequantize, is_quantized, recomputed
from jaxpeft.trees import Adapters, Layers, Params, constants_of, join, leaf_paths, nest, without_shared

ALL = Channels()
"""Every channel of a layer."""

RowKey = Callable[[jax.Array], jax.Array]
"""From a key the key that draws for the rows of an array (`jaxpeft.training.dropout.PassRows.row_key`)."""

LayerOverride = Callable[[Callable[..., jax.Array], jax.Array], jax.Array]
"""`(run, x) → y`, called instead of a linear layer on its input x. `run(x, channels)` computes the layer, with its adapter, at the
`channels` (default: all of them)."""


class RecordedCalls:
    """The calls of linear layers and embeddings, as `(layer path, kind)`, in order. `sites` makes sites of them."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Literal["linear", "embedding"]]] = []

    def record(self, call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        """Note a call and let it through, as `flax.linen.intercept_methods` asks for it."""
        if kind := _kind(context):
            self._calls.append(("/".join(context.module.path), kind))
        return call(*args, **kwargs)

    def sites(self, leaves: Mapping[str, Any]) -> dict[str, Site]:
        """The sites by layer path, in the order of the calls. `leaves` are the module's parameters or their shapes, by leaf path.

        Raises:
            InputError: for a module scanned over its layers, because all of them share one path.
        """
        sites: dict[str, Site] = {}
        for path, kind in self._calls:
            if f"{path}/{_MATRIX[kind]}" not in leaves:
                continue
            shape = leaves[f"{path}/{_MATRIX[kind]}"].shape
            if len(shape) != 2:
                raise InputError(
                    f"layer {path} has a kernel of shape {shape}: a model scanned over its layers has one path for "
                    "all of them and cannot be adapted; build it unscanned"
                )
            sites[path] = Site(path, shape[0], shape[1], kind)
        return sites


@contextmanager
def recorded_calls() -> Iterator[RecordedCalls]:
    """A context manager that records the layers that Flax modules call in it."""
    calls = RecordedCalls()
    with nn.intercept_methods(calls.record):
        yield calls


def discover_sites(module: nn.Module, params: Params, **inputs: Any) -> dict[str, Site]:
    """Return the linear layers and embeddings that `module` calls on `inputs`, by layer path, in the order of the calls.

    Nothing is computed (`jax.eval_shape`), and `params` may be arrays or shapes. A decoder tied to the embeddings has no kernel of
    its own and is not a site.

    Raises:
        InputError: for a module scanned over its layers, because all of them share one path.
    """
    leaves = leaf_paths(params)
    # Flax checks the shapes of parameters, so a quantised kernel is replaced by the shape of its matrix.
    dense = nest({path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in leaves.items()})
    with recorded_calls() as calls:
        jax.eval_shape(lambda dense: module.apply({"params": dense}, **inputs), dense)
    return calls.sites(leaves)


def apply(
    module: nn.Module,
    frozen: Params,
    adapters: Adapters,
    method: Method | None = None,
    *,
    masks: Layers | None = None,
    dropout_rng: jax.Array | None = None,
    row_key: RowKey | None = None,
    input_hooks: Mapping[str, Callable[[jax.Array], jax.Array]] | None = None,
    module_overrides: Mapping[str, Callable[..., Any]] | None = None,
    layer_overrides: Mapping[str, LayerOverride] | None = None,
    **inputs: Any,
) -> Any:
    """Run `module` on `inputs` with `adapters` at their layers; return the module's own output.

    Args:
        module: any Flax linen module.
        frozen: its parameters except those in `adapters["modules"]`. Kernels may be quantised.
        adapters: `{"sites": …, "modules": …}`, from `init_adapters`.
        method: the method that the parameters at the sites belong to; None if there are none.
        masks: by layer, like `adapters["sites"]`; bool, True = keep. Layers without a mask are dense. Of a sparse update the int32
            indices that are in force, if they were redrawn.
        dropout_rng: key for the dropout of base and adapters; None runs without dropout.
        row_key: makes from a layer's key the one that draws for its input's rows, if these are some rows of a larger batch.
        input_hooks: module path → function applied to every positional argument of the module's call.
        module_overrides: module path → function called instead of the module. Its first argument is the module, the others are
            those of the call. The layers that it calls keep their adapters.
        layer_overrides: layer path → function that decides which channels of a linear layer are computed, for which tokens.
        **inputs: the module's keyword arguments.

    Raises:
        InputError: if the module does not call an adapted layer, or if there are masks and the method cannot be pruned.
    """
    check_masks(method, masks)
    sites = apply_masks(adapters["sites"], masks or {})
    constants = constants_of(frozen, masks)
    frozen, shared = without_shared(frozen)
    leaves = leaf_paths(join(frozen, adapters["modules"]))
    quantized = {path: leaf for path, leaf in leaves.items() if is_quantized(leaf)}
    params = nest({path: leaf for path, leaf in leaves.items() if path not in quantized})
    visited: set[str] = set()
    called: set[str] = set()
    input_hooks, module_overrides, layer_overrides = input_hooks or {}, module_overrides or {}, layer_overrides or {}

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        path = "/".join(context.module.path)
        if (path in input_hooks or path in module_overrides) and context.method_name == "__call__":
            called.add(path)
            args = tuple(map(input_hooks[path], args)) if path in input_hooks else args
            if path in module_overrides:
                return module_overrides[path](context.module, *args, **kwargs)
        if isinstance(context.module, nn.Dropout) and row_key and dropout_rng is not None:
            return call(*args, **{"rng": row_key(context.module.make_rng("dropout")), **kwargs})
        tensor = quantized.get(f"{path}/kernel")
        if not _kind(context) or (tensor is None and path not in sites and path not in layer_overrides):
            is_product = isinstance(context.module, nn.Dense) and context.method_name == "__call__"
            return flat(call, *args) if is_product else call(*args, **kwargs)
        visited.add(path)
        own = sites.get(path)
        assert own is None or isinstance(method, SiteMethod), "adapters at sites need the method they belong to"
        at = method.at(path) if own is not None and isinstance(method, SiteMethod) else None
        params = {} if own is None else {**shared, **constants.get(path, {}), **own}

        def run(x: jax.Array, channels: Channels = ALL) -> jax.Array:
            # Flax folds the layer's path into the key. So the base's dropout draws the same masks as without adapters.
            key = context.module.make_rng("dropout") if at and at.uses_rng and dropout_rng is not None else None
            key = row_key(key) if row_key and key is not None else key
            return _run_layer(context.module, call, x, tensor, at, params, key, channels)

        return layer_overrides[path](run, args[0]) if path in layer_overrides else run(args[0])

    rngs = None if dropout_rng is None else {"dropout": dropout_rng}
    with nn.intercept_methods(intercept):
        out = module.apply({"params": params}, rngs=rngs, deterministic=dropout_rng is None, **inputs)
    for path in sites:
        if path not in visited:
            raise InputError(
                f"the adapter names layer '{path}', which the model never calls{did_you_mean(path, visited)}"
            )
    expected = input_hooks.keys() | module_overrides.keys() | layer_overrides.keys()
    called |= layer_overrides.keys() & visited
    assert called == expected, f"hooks or overrides at {expected - called}, which the model never calls"
    return out


_MATRIX: dict[Literal["linear", "embedding"], str] = {"linear": "kernel", "embedding": "embedding"}


def _kind(context: nn.module.InterceptorContext) -> Literal["linear", "embedding"] | None:
    # A tied decoder is an unbound Dense with an empty path, or a call of an embedding's `attend`. It is not a site.
    if context.method_name != "__call__" or not context.module.path:
        return None
    return (
        "linear"
        if isinstance(context.module, nn.Dense)
        else "embedding"
        if isinstance(context.module, nn.Embed)
        else None
    )


def _run_layer(
    module: nn.Module,
    call: Callable,
    x: jax.Array,
    tensor: QuantizedTensor | None,
    method: SiteMethod | None,
    params: SiteParams,
    rng: jax.Array | None,
    channels: Channels = ALL,
) -> jax.Array:
    """Run one layer. Its kernel is an array, or quantised in `tensor`. `method` and `params` are its adapter, if it has one."""
    if isinstance(module, nn.Embed):
        assert method is not None
        table: jax.Array = module.get_variable("params", "embedding")
        dtype = module.dtype or table.dtype
        layer = FrozenLayer(call, table.astype, None, dtype, is_embedding=True)
        return method.forward(x, params, layer, rng)
    assert isinstance(module, nn.Dense)
    dtype = module.dtype or x.dtype
    bias: jax.Array | None = module.get_variable("params", "bias")

    if tensor is None:
        kernel: jax.Array = module.get_variable("params", "kernel")
        layer = FrozenLayer(partial(flat, call), kernel.astype, bias, dtype)
        return _forward(method, x, params, layer, rng, channels)

    # Options of the method may be traced arrays (`training/sweep.py`). `run` is recomputed, so it must not close over those.
    options = {name: value for name, value in vars(method).items() if isinstance(value, jax.Array)} if method else {}

    @recomputed
    def run(
        stored: tuple[QuantizedTensor, Channels],
        rng: jax.Array | None,
        x: jax.Array,
        bias: jax.Array | None,
        params: SiteParams,
        options: dict[str, jax.Array],
    ) -> jax.Array:
        tensor, channels = stored

        def base(x: jax.Array) -> jax.Array:
            return layer.plus_bias(product(x.astype(dtype), layer.kernel()))

        layer = FrozenLayer(base, lambda dtype: dequantize(tensor, dtype), bias, dtype)
        own: SiteMethod | None = replace(method, **options) if method else None  # type: ignore[type-var]
        return _forward(own, x, params, layer, rng, channels)

    return run((tensor, channels), rng, x, bias, params, options)


def _forward(
    method: SiteMethod | None,
    x: jax.Array,
    params: SiteParams,
    layer: FrozenLayer,
    rng: jax.Array | None,
    channels: Channels,
) -> jax.Array:
    if not channels.are_all:
        return forward_at(method, x, params, layer, rng, channels)
    return layer.base(x) if method is None else method.forward(x, params, layer, rng)
