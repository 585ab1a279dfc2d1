"""SHIRA in PEFT's files: the values of a layer and their indices, `[2, n]` int32: rows and columns of torch's weight `[out, in]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapters import S2ft, Shira, Site
from jaxpeft.adapters.sparse_indices import places
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.constants import whole_numbers
from jaxpeft.interop.peft.format import Config, Format, without_exclude_modules
from jaxpeft.trees import Layers


class ShiraFormat(Format):
    """`shira_weight` and `shira_indices`, names without `.weight`.

    PEFT itself chooses random entries only. It loads any others from the file, whatever `mask_type` says.
    """

    peft_type = "SHIRA"
    keys = {"shira_weight": "v", "shira_indices": "indices"}  # noqa: RUF012

    def to_config(self, method: Shira) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        return {
            "r": method.rank,
            "mask_type": method.mask_type,
            "random_seed": method.random_seed,
            "init_weights": method.init_weights,
            "fan_in_fan_out": False,
        }

    def from_config(self, config: Config) -> Shira:
        """A missing key has PEFT's default."""
        return Shira(
            rank=config.get("r", 32),
            mask_type=config.get("mask_type", "random"),
            random_seed=config.get("random_seed"),
            init_weights=config.get("init_weights", True),
        )

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """The config without exclude_modules, which PEFT's SHiRA lacks."""
        return without_exclude_modules(config, layers)

    def with_constants(
        self, method: Any, sites: Layers, constants: Layers, targets: Mapping[str, Site]
    ) -> tuple[Any, Layers]:
        """The indices as two numbers for each entry, `[n, 2]`."""
        found = {}
        for path, params in sites.items():
            rows, columns = places(constants[path]["indices"], targets[path].d_in)
            found[path] = {**params, "indices": jnp.stack([columns, rows], axis=1)}
        return method, found

    def read_constant(self, name: str, tensor: jax.Array, site: Site) -> jax.Array:
        """Flat indices `[n]` from `[n, 2]`."""
        if tensor.ndim != 2 or tensor.shape[1] != 2:
            raise InputError(f"shira_indices of layer {site.path} have shape {tensor.shape[::-1]}; PEFT's are [2, n]")
        outputs, inputs = whole_numbers(tensor).T
        if not bool(((inputs >= 0) & (inputs < site.d_in)).all()):
            raise InputError(
                f"shira_indices of layer {site.path} name inputs outside 0 to {site.d_in - 1}: they belong to another base"
            )
        return outputs * site.d_in + inputs


class S2ftFormat(ShiraFormat):
    """S²FT as a SHIRA, which is how every load reads it.

    PEFT derives the number of values of a layer from one r, as r·(in + out). So r is the smallest that holds every layer, and
    the entries that are left over are zeros at unused places.
    """

    def reads(self, peft_type: str, config: Config) -> bool:
        """False: the file is a SHIRA's."""
        return False

    def with_constants(
        self, method: S2ft, sites: Layers, constants: Layers, targets: Mapping[str, Site]
    ) -> tuple[Any, Layers]:
        """Every entry of the trained rows with its index, in the order of torch's weight.

        Raises:
            InputError: if a layer has no room for r·(in + out) entries.
        """
        rank = max(
            -(-params["delta"].size // (targets[path].d_in + targets[path].d_out)) for path, params in sites.items()
        )
        found: Layers = {}
        indices_of: Layers = {}
        for path, params in sites.items():
            site, delta = targets[path], np.asarray(params["delta"])
            number, size = rank * (site.d_in + site.d_out), site.d_in * site.d_out
            if number > size:
                raise InputError(
                    f"PEFT's file of an S²FT has r·(in + out) values in every layer, here with r {rank}: layer {path} has only {size} "
                    "weights; merge the adapter instead, or train layers of like size"
                )
            rows = np.asarray(constants[path]["rows"])
            indices = (np.arange(site.d_out)[:, None] * site.d_in + rows).reshape(-1)
            unused = np.setdiff1d(np.arange(site.d_in * site.d_out), indices)[: number - indices.size]
            values = np.concatenate([delta.T.reshape(-1), np.zeros(unused.size, np.float32)])
            found[path] = {"v": jnp.asarray(values)}
            indices_of[path] = {"indices": jnp.asarray(np.concatenate([indices, unused]), jnp.int32)}
        return super().with_constants(Shira(rank=rank, mask_type="s2ft"), found, indices_of, targets)
