"""LN_TUNING in PEFT's files: the norms' own parameters, `….LayerNorm.ln_tuning_layers.weight` and `.bias`."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import LnTuning
from jaxpeft.interop.peft.format import Config, Format

# PEFT has no default for BERTs. These are the names of all norms in the Flax models of transformers.
_EVERY_NORM = r".*(LayerNorm|layer_norm)"


class LnTuningFormat(Format):
    """The only tensors are those of the norms; `target_modules` names them."""

    peft_type = "LN_TUNING"
    module_infix = "ln_tuning_layers."

    def to_config(self, method: LnTuning) -> dict[str, Any]:
        """PEFT's options."""
        targets = _EVERY_NORM if method.target_modules is None else method.target_modules
        return {"target_modules": _plain(targets), "exclude_modules": _plain(method.exclude_modules)}

    def from_config(self, config: Config) -> LnTuning:
        """A missing target_modules means every norm. PEFT's default for the BERTs is no norm at all."""
        targets = config.get("target_modules")
        return LnTuning(None if targets == _EVERY_NORM else targets, config.get("exclude_modules"))


def _plain(names: Any) -> Any:
    return names if names is None or isinstance(names, str) else list(names)
