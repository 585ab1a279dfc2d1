"""VERA in PEFT's files: two vectors per layer, and once the random factors that all layers share."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import Vera
from jaxpeft.interop.peft.format import Config, Format, without_exclude_modules


class VeraFormat(Format):
    """`vera_lambda_d` and `vera_lambda_b`; with `save_projection` also `base_model.vera_A` and `base_model.vera_B`."""

    peft_type = "VERA"
    keys = {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"}  # noqa: RUF012
    shared_keys = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}  # noqa: RUF012
    unsupported = {"bias": "none"}  # noqa: RUF012

    def to_config(self, method: Vera) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        return {
            "r": method.rank,
            "vera_dropout": method.dropout,
            "d_initial": method.d_initial,
            "save_projection": method.save_projection,
            "projection_prng_key": method.projection_prng_key,
            "init_weights": method.init_weights,
            "bias": "none",
            "fan_in_fan_out": False,
        }

    def from_config(self, config: Config) -> Vera:
        """A missing key has PEFT's default."""
        return Vera(
            rank=config.get("r", 256),
            dropout=config.get("vera_dropout", 0.0),
            d_initial=config.get("d_initial", 0.1),
            save_projection=config.get("save_projection", True),
            projection_prng_key=config.get("projection_prng_key", 0),
            init_weights=config.get("init_weights", True),
        )

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """The config without exclude_modules, which PEFT's VeRA lacks."""
        return without_exclude_modules(config, layers)
