"""ADALORA in PEFT's files: names have no `.weight`. Pruned triplets are left out of the tensors; `rank_pattern` records them.

`lora_A`, `lora_E` and `lora_B` have as many rows (columns) as `rank_pattern` has trues for the layer, or `init_r` without a pattern.
The scaling divides by `init_r` in both cases: PEFT keeps `ranknum` when it cuts a layer.
"""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import AdaLora
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.format import Config, Format


class AdaLoraFormat(Format):
    """`lora_A`, `lora_B` and `lora_E`; PEFT uses LoRA's options alpha, dropout, bias and init_lora_weights."""

    peft_type = "ADALORA"
    keys = {"lora_A": "a", "lora_B": "b", "lora_E": "e"}  # noqa: RUF012
    unsupported = {  # noqa: RUF012
        "layer_replication": None,
        "target_parameters": None,
        "trainable_token_indices": None,
    }

    def to_config(self, method: AdaLora) -> dict[str, Any]:
        """The method's keys in adapter_config.json.

        Raises:
            InputError: if the method has no `total_step`, which PEFT demands of every file.
        """
        if method.total_step is None:
            raise InputError(
                "PEFT's file of an AdaLoRA records the number of steps of its schedule; give the method total_step"
            )
        return {
            "target_r": method.target_r,
            "init_r": method.init_r,
            "tinit": method.tinit,
            "tfinal": method.tfinal,
            "deltaT": method.deltaT,
            "beta1": method.beta1,
            "beta2": method.beta2,
            "orth_reg_weight": method.orth_reg_weight,
            "total_step": method.total_step,
            "rank_pattern": {layer: list(kept) for layer, kept in method.rank_pattern.items()} or None,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "bias": method.bias,
            "init_lora_weights": method.init_lora_weights,
            "fan_in_fan_out": False,
        }

    def from_config(self, config: Config) -> AdaLora:
        """A missing key has PEFT's default; PEFT takes every init_lora_weights but false as true."""
        return AdaLora(
            target_r=config.get("target_r", 8),
            init_r=config.get("init_r", 12),
            tinit=config.get("tinit", 0),
            tfinal=config.get("tfinal", 0),
            deltaT=config.get("deltaT", 1),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
            orth_reg_weight=config.get("orth_reg_weight", 0.5),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            bias=config.get("bias", "none"),
            init_lora_weights=bool(config.get("init_lora_weights", True)),
            rank_pattern=config.get("rank_pattern") or {},
            total_step=config.get("total_step"),
        )
