"""VERA in PEFT's files: two vectors a layer, and the random factors of all layers once."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import Vera
from jaxpeft.interop.peft.format import Config, Format


class VeraFormat(Format):
    """`vera_lambda_d` and `vera_lambda_b`, and `base_model.vera_A` and `base_model.vera_B` for all, if `save_projection`."""

    peft_type = "VERA"
    keys = {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"}  # noqa: RUF012
    shared_keys = {"base_model.vera_A": "vera_a", "base_model.vera_B": "vera_b"}  # noqa: RUF012
    unsupported = {"bias": "none"}  # noqa: RUF012

    def to_config(self, method: Vera) -> dict[str, Any]:
        """PEFT's options."""
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
        """A key that is absent has PEFT's default."""
        return Vera(
            rank=config.get("r", 256),
            dropout=config.get("vera_dropout", 0.0),
            d_initial=config.get("d_initial", 0.1),
            save_projection=config.get("save_projection", True),
            projection_prng_key=config.get("projection_prng_key", 0),
            init_weights=config.get("init_weights", True),
        )

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """Without exclude_modules, which PEFT's VeRA has not: where some are excluded, the layers are named in full."""
        rest = {key: value for key, value in config.items() if key != "exclude_modules"}
        return {**rest, "target_modules": layers} if config["exclude_modules"] else rest
