"""IA3 in PEFT's files: one vector per layer, of shape [d_out, 1], or [1, d_in] if the layer is scaled at its input."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jaxpeft.adapters import Ia3
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.format import Config, Format


class Ia3Format(Format):
    """`ia3_l`.

    PEFT refuses a list of feedforward_modules with an entry that is not in the list of target_modules, such as "output.dense" if
    the target_modules are full names. Such a list is written as an equivalent regular expression, and read back as a list.
    """

    peft_type = "IA3"
    keys = {"ia3_l": "l"}  # noqa: RUF012

    def to_config(self, method: Ia3) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        modules = method.feedforward_modules
        return {
            "feedforward_modules": modules if isinstance(modules, str) else list(modules),
            "init_ia3_weights": method.init_ia3_weights,
            "fan_in_fan_out": False,
        }

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """The config with feedforward_modules in a form that PEFT accepts for these target_modules."""
        modules, targets = config["feedforward_modules"], config["target_modules"]
        lists = not isinstance(modules, str) and not isinstance(targets, str)
        return (
            {**config, "feedforward_modules": _expression(modules)} if lists and set(modules) - set(targets) else config
        )

    def from_config(self, config: Config) -> Ia3:
        """A missing key has PEFT's default.

        Raises:
            InputError: if feedforward_modules is missing, because PEFT's default for it depends on the model.
        """
        modules = config.get("feedforward_modules")
        if modules is None:
            raise InputError(
                "the adapter's config names no feedforward_modules; add the names of the layers scaled at their input, or []"
            )
        return Ia3(
            feedforward_modules=_endings(modules) if isinstance(modules, str) else modules,
            init_ia3_weights=config.get("init_ia3_weights", True),
        )


def _expression(endings: Sequence[str]) -> str:
    return f".*({'|'.join(re.escape(ending) for ending in endings)})"


def _endings(expression: str) -> str | list[str]:
    """Undo `_expression`; return any other expression unchanged."""
    endings = [re.sub(r"\\(.)", r"\1", ending) for ending in expression[3:-1].split("|")]
    return endings if _expression(endings) == expression else expression
