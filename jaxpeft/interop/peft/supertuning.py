"""SUPERTUNING in PEFT's files: the values of a layer, their flat indices `[n]` int32, and the LoRA beside them, if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxpeft.adapters import Site, SuperTuning
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.constants import whole_numbers
from jaxpeft.interop.peft.format import Config, Format, without_exclude_modules
from jaxpeft.trees import Layers


class SuperTuningFormat(Format):
    """`supertuning_values`, `supertuning_indices` (unless `save_precomputed_indices` is false), `supertuning_lora_A` and `_B`."""

    peft_type = "SUPERTUNING"
    keys = {  # noqa: RUF012
        "supertuning_values": "v",
        "supertuning_indices": "indices",
        "supertuning_lora_A.weight": "a",
        "supertuning_lora_B.weight": "b",
    }

    def to_config(self, method: SuperTuning) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        default = None if method.rank is None else 2 * method.rank
        return {
            "sparsity": method.sparsity,
            "select_top": method.select_top,
            "r": method.rank,
            "lora_alpha": default if method.alpha is None else method.alpha,
            "lora_dropout": method.dropout,
            "init_weights": method.init_weights,
            "save_precomputed_indices": method.save_precomputed_indices,
        }

    def from_config(self, config: Config) -> SuperTuning:
        """A missing key has PEFT's default."""
        return SuperTuning(
            sparsity=config.get("sparsity", 0.99),
            select_top=config.get("select_top", True),
            rank=config.get("r"),
            alpha=config.get("lora_alpha"),
            dropout=config.get("lora_dropout", 0.0),
            init_weights=config.get("init_weights", True),
            save_precomputed_indices=config.get("save_precomputed_indices", True),
        )

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """The config without exclude_modules, which PEFT's Super-Tuning lacks."""
        return without_exclude_modules(config, layers)

    def with_constants(
        self, method: SuperTuning, sites: Layers, constants: Layers, targets: Mapping[str, Site]
    ) -> tuple[SuperTuning, Layers]:
        """The indices as they are, or none."""
        if not method.saves_constants:
            return method, sites
        return super().with_constants(method, sites, constants, targets)

    def read_constant(self, name: str, tensor: jax.Array, site: Site) -> jax.Array:
        """The indices as they are."""
        if tensor.ndim != 1:
            raise InputError(
                f"supertuning_indices of layer {site.path} have shape {tensor.shape[::-1]}; PEFT's are [n]"
            )
        return whole_numbers(tensor)
