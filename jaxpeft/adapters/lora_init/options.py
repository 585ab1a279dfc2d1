"""The names of the starts and their options, with PEFT's defaults, and what is refused of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxpeft.errors import InputError, did_you_mean

Options = Mapping[str, Any]
"""PEFT's `loftq_config`, `eva_config` or `lora_ga_config`, in part or whole."""

DATA_DRIVEN = ("eva", "lora_ga")
"""The starts that need what `jaxpeft.calibration` measures."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "loftq_config": {"loftq_bits": 4, "loftq_iter": 1},
    "eva_config": {
        "rho": 2.0,
        "tau": 0.99,
        "use_label_mask": True,
        "label_mask_value": -100,
        "whiten": False,
        "adjust_scaling_factors": True,
    },
    "lora_ga_config": {"direction": "ArB2r", "scale": "stable", "stable_gamma": 16},
}
"""PEFT 0.21's defaults."""

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")

# What a value must be, where not any of its type will do, and in words.
_MUST_BE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "loftq_bits": (lambda value: value in (4, 8), "4 or 8"),
    "loftq_iter": (lambda value: type(value) is int and value >= 1, "a whole number of at least 1"),
    "rho": (lambda value: value >= 1, "at least 1"),
    "tau": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "direction": (lambda value: value in DIRECTIONS, f"one of {', '.join(DIRECTIONS)}"),
    "scale": (lambda value: value in SCALES, f"one of {', '.join(SCALES)}"),
    "stable_gamma": (lambda value: value > 0, "above 0"),
}

_STARTS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", *DATA_DRIVEN)


def check_start(start: bool | str, options: Mapping[str, Options | None], *, lora_bias: bool) -> None:
    """Raise InputError for an unknown start or option, or a bias on B with a start by name (PEFT's rule)."""
    if isinstance(start, str):
        if start not in _STARTS and not re.fullmatch(r"pissa_niter_\d+", start):
            known = ", ".join(("true", "false", *_STARTS, "pissa_niter_N"))
            raise InputError(
                f"init_lora_weights '{start}' is not supported; known: {known}{did_you_mean(start, _STARTS)}"
            )
        if lora_bias:
            raise InputError(f"lora_bias starts with init_lora_weights true or false only, as in PEFT; got '{start}'")
    for name, given in options.items():
        full_options(name, given)


def full_options(name: str, given: Options | None) -> dict[str, Any]:
    """The options called `name` with PEFT's defaults where they are not `given`.

    Raises:
        InputError: for an unknown option, or a value that it cannot have.
    """
    defaults = DEFAULTS[name]
    for key, value in (given or {}).items():
        if key not in defaults:
            raise InputError(f"{name} has no option '{key}'; known: {', '.join(defaults)}{did_you_mean(key, defaults)}")
        # One kind of number may stand for the other; nothing else stands for another type.
        fits = type(value) is type(defaults[key]) or {type(value), type(defaults[key])} == {int, float}
        allowed, words = _MUST_BE.get(key, (lambda value: True, f"a {type(defaults[key]).__name__}"))
        if not fits or not allowed(value):
            raise InputError(f"{name}.{key} must be {words}; got {value!r}")
    return {**defaults, **(given or {})}


def pissa_rounds(start: bool | str) -> int | None:
    """N of "pissa_niter_N"; None for every other start."""
    found = re.fullmatch(r"pissa_niter_(\d+)", str(start))
    return int(found[1]) if found else None
