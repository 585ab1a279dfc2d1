"""BitFit in PEFT's files: a LORA with bias="all" that adapts no layer, so the file has only the biases."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import BitFit
from jaxpeft.interop.peft.format import NO_TARGETS, Config, Format


class BitFitFormat(Format):
    """The biases under their own names."""

    peft_type = "LORA"

    def reads(self, peft_type: str, config: Config) -> bool:
        """True for a LORA that adapts no layer and trains the biases."""
        no_layer = config.get("target_modules") in (NO_TARGETS, [NO_TARGETS])
        return super().reads(peft_type, config) and no_layer and config.get("bias") == "all"

    def to_config(self, method: BitFit) -> dict[str, Any]:
        """The option that makes PEFT's LoRA a BitFit."""
        return {"bias": "all"}

    def from_config(self, config: Config) -> BitFit:
        """BitFit has no options."""
        return BitFit()
