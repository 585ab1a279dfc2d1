"""The names of a method's options, and what PEFT calls those that have another name there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jaxpeft.errors import InputError, did_you_mean

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "hira_dropout": "dropout",
    "vera_dropout": "dropout",
}
"""PEFT's name → the name here."""


def check_names(kind: Any, names: Iterable[str], what: str) -> None:
    """Check that all `names` are options of the method class `kind`, which is called `what` in the message.

    Raises:
        InputError: one is not. The message has our name for it, if it is PEFT's, or else the nearest one or all of them.
    """
    options = getattr(kind, "__dataclass_fields__", {})
    for name in names:
        if name in options:
            continue
        ours = PEFT_NAMES.get(name)
        if ours in options:
            raise InputError(f"{what} has no option '{name}', which is PEFT's name for it: call it {ours}")
        hint = did_you_mean(name, options) or f"; it has {', '.join(options) or 'none'}"
        raise InputError(f"{what} has no option '{name}'{hint}")
