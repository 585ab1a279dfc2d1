"""LOHA in PEFT's files."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import Loha
from jaxpeft.interop.peft.format import Config, Format
from jaxpeft.interop.peft.lycoris import from_options, to_options


class LohaFormat(Format):
    """`hada_w1_a`, `hada_w1_b`, `hada_w2_a` and `hada_w2_b`."""

    peft_type = "LOHA"
    keys = {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b")}  # noqa: RUF012

    def to_config(self, method: Loha) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        return {**to_options(method), "init_weights": method.init_weights}

    def from_config(self, config: Config) -> Loha:
        """A missing key has PEFT's default."""
        return Loha(**from_options(config), init_weights=config.get("init_weights", True))
