"""LOKR in PEFT's files."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import Lokr
from jaxpeft.interop.peft.format import Config, Format
from jaxpeft.interop.peft.lycoris import from_options, to_options


class LokrFormat(Format):
    """`lokr_w1`, or its factors `lokr_w1_a` and `lokr_w1_b`; likewise `lokr_w2`."""

    peft_type = "LOKR"
    keys = {f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}  # noqa: RUF012

    def to_config(self, method: Lokr) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        return {
            **to_options(method),
            "decompose_both": method.decompose_both,
            "decompose_factor": method.decompose_factor,
            "rank_dropout_scale": method.rank_dropout_scale,
            "init_weights": method.init_weights,
        }

    def from_config(self, config: Config) -> Lokr:
        """A missing key has PEFT's default."""
        return Lokr(
            **from_options(config),
            decompose_both=config.get("decompose_both", False),
            decompose_factor=config.get("decompose_factor", -1),
            rank_dropout_scale=config.get("rank_dropout_scale", False),
            init_weights=config.get("init_weights", True),
        )
