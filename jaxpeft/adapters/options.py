"""Checks of a method's options: their names, with what PEFT calls those that have another name there, and their ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
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


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "rank": (lambda value: value >= 1, "at least 1"),
    "dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
}


def check_options(kind: Any, options: Mapping[str, Any], what: str) -> None:
    """Check the names of `options`, as `check_names`, and the ranges of those that most methods have.

    Traced values, which several runs in one program have, are not checked.

    Raises:
        InputError: as `check_names`, or a value is out of its range.
    """
    check_names(kind, options, what)
    for name, (fits, wanted) in _RANGES.items():
        value = options.get(name)
        if isinstance(value, int | float) and not fits(value):
            raise InputError(f"adapter.{name} {value} must be {wanted}")


def check_names(kind: Any, names: Iterable[str], what: str) -> None:
    """Check that all `names` are options of the method class `kind`, which is called `what` in the message.

    Raises:
        InputError: one is not. The message has our name for it, if it is PEFT's, or else the nearest one or all of them.
    """
    options = [option.name for option in fields(kind)] if is_dataclass(kind) else []
    for name in names:
        if name in options:
            continue
        ours = PEFT_NAMES.get(name)
        if ours in options:
            raise InputError(f"{what} has no option '{name}', which is PEFT's name for it: call it {ours}")
        hint = did_you_mean(name, options) or f"; it has {', '.join(options) or 'none'}"
        raise InputError(f"{what} has no option '{name}'{hint}")
