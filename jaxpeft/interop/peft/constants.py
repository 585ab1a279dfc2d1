"""The constants of adapted layers (indices of sparse updates) on their way to a file and back.

In a file they stand beside the parameters of their layer, so a format names them in its `keys`, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.adapters import HasConstants, Site, SiteMethod
from jaxpeft.adapters.build import dense_kernel, init_constants
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.format import Format
from jaxpeft.trees import Layers, Params, constants_of, leaf_paths, without_shared


def put_beside(form: Format, method: HasConstants, sites: Layers, frozen: Params, masks: Layers) -> tuple[Any, Layers]:
    """The method and the sites' tensors as `form` holds them: parameters and constants, those in `masks` if they were redrawn.

    Raises:
        InputError: if `frozen` lacks the constants, or the format cannot hold them.
    """
    constants = constants_of(frozen, masks)
    if missing := [path for path in sites if path not in constants]:
        raise InputError(
            f"{form.peft_type} keeps the {', '.join(method.constants)} of layer {missing[0]} with the frozen parameters; give them as "
            "frozen="
        )
    leaves = leaf_paths(without_shared(frozen)[0])
    targets = {path: Site(path, *leaves[f"{path}/kernel"].shape) for path in sites}
    if not method.saves_constants:
        if any(name in masks.get(path, {}) for path in sites for name in method.redrawn):
            raise InputError(
                f"the {', '.join(method.redrawn)} of this {method.name} were redrawn in training, so that the base's weights do not say "
                "what they are; save the adapter with save_precomputed_indices true"
            )
        for path, site in targets.items():
            method.at(path).check_remade(site, dense_kernel(leaves, site), constants[path])
    return form.with_constants(method, sites, constants, targets)


def take_apart(
    form: Format, method: HasConstants, sites: Layers, targets: Mapping[str, Site], leaves: Mapping[str, Any]
) -> tuple[Layers, Layers]:
    """Undo `put_beside`: the parameters and the constants, by layer. A constant that the file lacks is made again or left out.

    Raises:
        InputError: if a constant has no shape of the format, does not fit its layer, or cannot be made again.
    """
    parameters: Layers = {}
    constants: Layers = {}
    for path, group in sites.items():
        parameters[path] = {name: leaf for name, leaf in group.items() if name not in method.constants}
        given = {name: leaf for name, leaf in group.items() if name in method.constants}
        constants[path] = {name: form.read_constant(name, leaf, targets[path]) for name, leaf in given.items()}
    if not method.saves_constants and not any(constants.values()):
        constants = init_constants(method, targets, leaves, rng=jax.random.key(0))
        for path, site in targets.items():
            method.at(path).check_remade(site, dense_kernel(leaves, site), constants[path])
    for path, group in constants.items():
        if group:
            method.at(path).check_constants(targets[path], group)
    return parameters, constants


def shapes_of(method: SiteMethod, site: Site) -> dict[str, tuple[int, ...]]:
    """The shapes of everything that `method` has at `site`: parameters and constants."""
    return {**method.shapes(site), **(method.constant_shapes(site) if isinstance(method, HasConstants) else {})}


def whole_numbers(tensor: jax.Array) -> jax.Array:
    """Indices as int32. On Windows PEFT writes them as float32."""
    return jnp.asarray(tensor).round().astype(jnp.int32)
