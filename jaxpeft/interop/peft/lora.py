"""LORA in PEFT's files, with DoRA, biases, patterns and every initialisation."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import Lora
from jaxpeft.adapters.lora_init import full_options
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.converted import without_start
from jaxpeft.interop.peft.format import Config, Format
from jaxpeft.trees import Layers


class LoraFormat(Format):
    """`lora_A.weight`, `lora_B.weight`, `lora_magnitude_vector`; an embedding's have no `.weight`."""

    peft_type = "LORA"
    keys = {  # noqa: RUF012
        "lora_A.weight": "a",
        "lora_B.weight": "b",
        "lora_B.bias": "bias",
        "lora_magnitude_vector": "m",
    }
    embedding_keys = {"lora_embedding_A": "a", "lora_embedding_B": "b", "lora_magnitude_vector": "m"}  # noqa: RUF012
    unsupported = {  # noqa: RUF012
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "kasa_config": None,
        "layer_replication": None,
        "monteclora_config": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_qalora": False,
        "velora_config": None,
    }

    def holds(self, method: Lora) -> bool:
        """False for an update that is masked by the base's zeros: PEFT would add all of it."""
        return not method.keep_base_zeros

    def to_config(self, method: Lora) -> dict[str, Any]:
        """The method's keys in adapter_config.json.

        Those of an initialisation are written in full, and only for it, because PEFT warns about options that it ignores.
        """
        start = method.init_lora_weights
        return {
            "r": method.rank,
            "lora_alpha": method.alpha,
            "lora_dropout": method.dropout,
            "use_rslora": method.use_rslora,
            "use_dora": method.use_dora,
            "rank_pattern": dict(method.rank_pattern),
            "alpha_pattern": dict(method.alpha_pattern),
            "bias": method.bias,
            "lora_bias": method.lora_bias,
            "init_lora_weights": start,
            "loftq_config": full_options("loftq_config", method.loftq_config) if start == "loftq" else {},
            "eva_config": full_options("eva_config", method.eva_config) if start == "eva" else None,
            "lora_ga_config": full_options("lora_ga_config", method.lora_ga_config) if start == "lora_ga" else None,
            "fan_in_fan_out": False,
        }

    def exported(self, method: Lora, sites: Layers, start: Layers | None) -> tuple[Lora, Layers]:
        """The difference to the initial adapter `start`, if the initialisation adjusted the base.

        Without `start` the file is PEFT's unconverted one. That is right for PiSSA and OLoRA, because every load adjusts the base again.

        Raises:
            InputError: if a load cannot repeat the adjustment (LoRA-GA, "pissa_niter_N") and `start` is not given.
        """
        if not method.exports_difference or not sites:
            return method, sites
        if start is not None:
            return without_start(method, sites, start)
        if method.init_lora_weights in ("pissa", "olora"):
            return method, sites
        raise InputError(
            f"init_lora_weights '{method.init_lora_weights}' changed the base in a way that no load can repeat; give the initial "
            "adapter as start=, so that the file can hold the difference to it"
        )

    def from_config(self, config: Config) -> Lora:
        """A missing key has PEFT's default.

        Raises:
            InputError: if the initialisation is not supported, such as corda or mica.
        """
        start = config.get("init_lora_weights", True)
        return Lora(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            bias=config.get("bias", "none"),
            lora_bias=config.get("lora_bias", False),
            # PEFT is case-sensitive for some of the names only.
            init_lora_weights=True if start is None else start.lower() if isinstance(start, str) else start,
            loftq_config=config.get("loftq_config") or None,
            eva_config=config.get("eva_config"),
            lora_ga_config=config.get("lora_ga_config"),
        )
