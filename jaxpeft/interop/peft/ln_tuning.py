"""LN_TUNING in PEFT's files: the norms' own parameters, `….LayerNorm.ln_tuning_layers.weight` and `.bias`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxpeft.adapters import LnTuning
from jaxpeft.families import known, required
from jaxpeft.families.base import Family
from jaxpeft.interop.peft.format import Config, Format


class LnTuningFormat(Format):
    """The only tensors are the norms' own; `target_modules` names the norms."""

    peft_type = "LN_TUNING"
    module_infix = "ln_tuning_layers."

    def for_family(self, method: LnTuning, family: Family) -> LnTuning:
        """Return `method` with the family's expression for all norms if it names none: PEFT has no keyword for all of them."""
        if method.target_modules is not None:
            return method
        return replace(
            method, target_modules=required(family, "norms", "ln-tuning without target_modules, in PEFT's files")
        )

    def to_config(self, method: LnTuning) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        return {
            "target_modules": _plain(method.target_modules),
            "exclude_modules": _plain(method.exclude_modules),
        }

    def from_config(self, config: Config) -> LnTuning:
        """Without target_modules, and with a family's expression for all norms, every norm trains.

        PEFT's default would be no norm at all for the BERTs.
        """
        targets = config.get("target_modules")
        return LnTuning(None if targets in known("norms").values() else targets, config.get("exclude_modules"))


def _plain(names: Any) -> Any:
    return names if names is None or isinstance(names, str) else list(names)
