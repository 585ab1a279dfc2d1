"""Fields that were renamed: files and commands with the old name are still read."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from jaxpeft.errors import InputError


def read_old_name(config: Any, old: str, new: str) -> None:
    """Move the value of the field `old` of a frozen dataclass to the field `new`, if it is not None.

    Raises:
        InputError: both are given, with different values. (A new name with its default value counts as not given.)
    """
    value, current = getattr(config, old), getattr(config, new)
    if value is None:
        return
    (default,) = (field.default for field in fields(config) if field.name == new)
    if current not in (default, value):
        raise InputError(f"{new} is {current}, and {old}, its old name, is {value}: give only {new}")
    object.__setattr__(config, new, value)
    object.__setattr__(config, old, None)
