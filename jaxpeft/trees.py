"""Paths of layers and leaves, and functions that split and join trees by them.

A *layer path* is Flax's module path joined by slashes (`bert/encoder/layer/0/attention/self/query`). A *leaf path* adds the
parameter's name (`…/query/kernel`). A model's parameters are Flax's nested dictionaries. Adapters and masks are dictionaries of
two levels, layer path → parameter name → array. So one path means the same layer everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

T = TypeVar("T")

Params = dict[str, Any]
"""A model's parameters: Flax's nested dictionaries of arrays (or quantised tensors)."""

Layers = dict[str, dict[str, Any]]
"""Parameters by layer: layer path → parameter name → array."""

Adapters = dict[str, Layers]
"""The trained parameters: `{"sites": adapter parameters by layer, "modules": fully trained leaves of the base, by layer}`."""


def leaf_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested `params` to leaf path → leaf, sorted by path. A quantised tensor is one leaf."""
    return dict(sorted(flatten_dict(dict(params), sep="/").items()))


def nest(leaves: Mapping[str, Any]) -> Params:
    """Undo `leaf_paths`."""
    return unflatten_dict(dict(leaves), sep="/")


def by_layer(leaves: Mapping[str, Any]) -> Layers:
    """Group leaf path → leaf by layer: `{"a/b/kernel": k}` becomes `{"a/b": {"kernel": k}}`."""
    layers: Layers = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer, {})[name] = leaf
    return layers


def by_leaf(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Undo `by_layer`."""
    # A leaf of the outermost module belongs to the layer "".
    return {f"{layer}/{name}".lstrip("/"): leaf for layer, group in layers.items() for name, leaf in group.items()}


def split(params: Params, selected: Callable[[str], bool]) -> tuple[Params, Layers]:
    """Split `params` into the nested rest and the `selected` leaf paths, by layer."""
    leaves = leaf_paths(params)
    rest = {path: leaf for path, leaf in leaves.items() if not selected(path)}
    return nest(rest), by_layer({path: leaf for path, leaf in leaves.items() if path not in rest})


def join(params: Params, layers: Mapping[str, Mapping[str, Any]]) -> Params:
    """Undo `split`: put `layers` back into nested `params`. A leaf in both is taken from `layers`."""
    return nest({**flatten_dict(dict(params), sep="/"), **by_leaf(layers)}) if layers else params


SHARED = "+shared"
"""Key in `frozen`, beside the model's modules, of the arrays that a method shares among all sites (`SharesFactors.init_shared`).

No Flax module can have this name.
"""


ESTIMATORS = "+estimators"
"""Key in `frozen`, beside the model's modules, of the estimators that choose channels (`jaxpeft.contextual`): layer path → arrays."""


CONSTANTS = "+constants"
"""Key in `frozen`, beside the model's modules, of frozen arrays that belong to one adapted layer each: layer path → name → array.

`HasConstants.init_constants` makes them, for example the indices of a sparse update. They are no parameters.
"""


def without_shared(frozen: Params) -> tuple[Params, dict[str, Any]]:
    """Split `frozen` into the model's own parameters and the arrays that the method shares among its sites.

    The constants of the layers are in neither; `constants_of` returns them.
    """
    own = {key: value for key, value in frozen.items() if key not in (SHARED, CONSTANTS, ESTIMATORS)}
    return own, frozen.get(SHARED, {})


def constants_of(frozen: Params, masks: Mapping[str, Mapping[str, Any]] | None = None) -> Layers:
    """The constants of the adapted layers, by layer path; {} if the method has none.

    If `masks` hold a constant, it was redrawn in training (`Method.redrawn`) and takes the place of the first one.
    """
    constants: Layers = frozen.get(CONSTANTS, {})
    if not masks:
        return constants
    return {
        path: {name: masks.get(path, {}).get(name, leaf) for name, leaf in group.items()}
        for path, group in constants.items()
    }


def beside_model(frozen: Params) -> Params:
    """The entries of `frozen` that the method put beside the model's own parameters: shared arrays and constants."""
    return {key: frozen[key] for key in (SHARED, CONSTANTS) if key in frozen}


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Return True if `path` is one of `prefixes` or below one. Every path is below the prefix ""."""
    return any(not prefix or path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def below(prefix: str, path: str) -> str:
    """Return `path` below `prefix`: `bert/encoder` for `bert` and `encoder`, and `path` itself below the prefix ""."""
    return f"{prefix}/{path}" if prefix else path


def pattern_value(patterns: Mapping[str, T], path: str, default: T) -> T:
    r"""Return the value for a layer, by PEFT's rule for `rank_pattern` and `alpha_pattern`.

    Keys are regular expressions. The first that matches the layer's dotted name, or its end after a dot, wins:
    `{"query": 4, r"layer\.0\..*": 8}` gives 4 at `enc/layer/0/query` and 8 at `enc/layer/0/key`.
    """
    name = path.replace("/", ".")
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def count(tree: Any) -> int:
    """Return the number of parameters in a tree. A quantised tensor counts as many as the matrix it stores.

    The constants of adapted layers (`CONSTANTS`) are not counted.
    """
    if isinstance(tree, dict):
        tree = {key: value for key, value in tree.items() if key != CONSTANTS}
    has_size = lambda leaf: hasattr(leaf, "size_bytes")  # noqa: E731
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree, is_leaf=has_size))


def size_bytes(tree: Any) -> int:
    """Return the bytes of all arrays in a tree, as they are stored."""
    return sum(int(leaf.size) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
