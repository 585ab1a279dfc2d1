"""Which runs can train together, in one program (`jaxpeft.runs.sweep`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxpeft.adapters import METHODS
from jaxpeft.config import RunConfig
from jaxpeft.config.files import flat
from jaxpeft.errors import InputError

T = TypeVar("T")

_STARTS_ON_ONE_BASE = (None, True, False, "gaussian", "orthogonal")


def sweep_key(config: RunConfig) -> str | None:
    """Runs of one key can train together; None: this run trains alone.

    They may differ in name, seed, learning rate and pruning, and in the options that the method shares (`Method.shareable`).
    """
    return None if _reason_to_train_alone(config) else json.dumps(_shared_values(config), sort_keys=True)


def check_shared_key(configs: Sequence[RunConfig]) -> None:
    """Raise InputError if `configs` cannot share a program, with the keys in which they must not differ."""
    names = [config.run_name for config in configs]
    for config in configs:
        if reason := _reason_to_train_alone(config):
            raise InputError(f"'{config.run_name}' cannot train together with other runs: {reason}; train it by itself")
        if names.count(config.run_name) > 1:
            raise InputError(f"two of these runs are called '{config.run_name}'; give each its own name")
    first = flat(_shared_values(configs[0]))
    for config in configs[1:]:
        other = flat(_shared_values(config))
        missing = object()
        differ = sorted(key for key in first | other if first.get(key, missing) != other.get(key, missing))
        if differ:
            said = "; ".join(f"{key}: {first.get(key)} and {other.get(key)}" for key in differ)
            raise InputError(
                f"'{configs[0].run_name}' and '{config.run_name}' cannot train together, because they differ in {said}; "
                "give them the same values, or train them one by one"
            )


def _reason_to_train_alone(config: RunConfig) -> str:
    a = config.adapter
    if a.method == "full":
        return "full fine-tuning freezes nothing that runs could share"
    if config.distributed:
        return "runs that train together use one process"
    if config.model.attention == "flash":
        return "flash attention's kernels have no axis of runs"
    if a.init_lora_weights not in _STARTS_ON_ONE_BASE:
        return f"adapter.init_lora_weights '{a.init_lora_weights}' gives every run a base of its own"
    return ""


def _shared_values(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration without the keys in which runs of one program may differ."""
    a = config.adapter
    values = config.resolved()
    free = ["name", "pruning", "training.learning_rate", *(f"adapter.{name}" for name in _free_options(config))]
    free += ["seed"] if config.model.weights == "pretrained" else []  # a random base is another with another seed
    allocated = a.method in METHODS and METHODS[a.method].allocated
    free = [key for key in free if not (key == "pruning" and allocated)]
    # LoRA+'s rate for embeddings is told as a multiple of the other.
    free = [key for key in free if not (key == "training.learning_rate" and config.training.loraplus_lr_ratio)]
    for key in free:
        section, _, name = key.rpartition(".")
        (values[section] if section else values).pop(name)
    return values


def _free_options(config: RunConfig) -> list[str]:
    a = config.adapter
    # A pattern's alpha is divided by the rank that the run has alone, not by the rank it is padded to.
    fixed = {"rank": bool(a.rank_pattern or a.alpha_pattern), "alpha": bool(a.alpha_pattern)}
    free = METHODS[a.method].shareable if a.method in METHODS else ()
    return [option for option in free if not fixed.get(option)]


def chunked(runs: Sequence[T], most: int) -> list[list[T]]:
    """`runs` in pieces of at most `most`, as equal as can be."""
    pieces = -(-len(runs) // most)
    return [list(runs[i * len(runs) // pieces : (i + 1) * len(runs) // pieces]) for i in range(pieces)]
