"""The names and options of LoRA's initialisations, with PEFT's defaults, and the checks of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxpeft.errors import InputError, did_you_mean

Options = Mapping[str, Any]
"""PEFT's `loftq_config`, `eva_config` or `lora_ga_config`; keys may be missing."""

DATA_DRIVEN = ("eva", "lora_ga")
"""The initialisations that need the statistics of `jaxpeft.calibration`."""

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

# Checks of options for which the type is not enough, each with its words for the error.
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
    """Raise InputError for an unknown initialisation or option, or for a bias on B with a named initialisation (PEFT's rule)."""
    if isinstance(start, str):
        if start not in _STARTS and not re.fullmatch(r"pissa_niter_\d+", start):
            known = ", ".join(("true", "false", *_STARTS, "pissa_niter_N"))
            raise InputError(
                f"init_lora_weights '{start}' is not supported; known: {known}{did_you_mean(start, _STARTS)}"
            )
        if lora_bias:
            raise InputError(f"lora_bias needs init_lora_weights true or false, as in PEFT; got '{start}'")
    for name, given in options.items():
        full_options(name, given)


def full_options(name: str, given: Options | None) -> dict[str, Any]:
    """The options of the group `name`: the `given` ones, and PEFT's defaults for the others.

    Raises:
        InputError: if an option is unknown or its value is not allowed.
    """
    defaults = DEFAULTS[name]
    for key, value in (given or {}).items():
        if key not in defaults:
            raise InputError(f"{name} has no option '{key}'; known: {', '.join(defaults)}{did_you_mean(key, defaults)}")
        # An int may replace a float and the other way round; no other type may replace another.
        fits = type(value) is type(defaults[key]) or {type(value), type(defaults[key])} == {int, float}
        allowed, words = _MUST_BE.get(key, (lambda value: True, f"a {type(defaults[key]).__name__}"))
        if not fits or not allowed(value):
            raise InputError(f"{name}.{key} must be {words}; got {value!r}")
    return {**defaults, **(given or {})}


def pissa_rounds(start: bool | str) -> int | None:
    """N of "pissa_niter_N"; None for every other initialisation."""
    found = re.fullmatch(r"pissa_niter_(\d+)", str(start))
    return int(found[1]) if found else None
