"""Decide which runs can train together in one program (`jaxpeft.runs.sweep`), without importing jax."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from jaxpeft.config import RunConfig
from jaxpeft.config.files import flat
from jaxpeft.errors import InputError

T = TypeVar("T")

_STARTS_ON_ONE_BASE = (None, True, False, "gaussian", "orthogonal")


def sweep_key(config: RunConfig) -> str | None:
    """A key that is equal for runs that can train together, or None if the run can only train by itself.

    Runs with one key may differ in name, seed, learning rate, pruning, initialisation and dropout, and for LoRA and HiRA in
    rank and alpha.
    """
    return None if _reason_to_train_alone(config) else json.dumps(_shared_values(config), sort_keys=True)


def check_shared_key(configs: Sequence[RunConfig]) -> None:
    """Raise InputError if `configs` cannot share a program. The message names the keys in which they must not differ."""
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
    """The resolved configuration without the keys in which runs that share a program may differ."""
    a = config.adapter
    values = config.resolved()
    free = ["name", "pruning", "training.learning_rate", *(f"adapter.{name}" for name in _free_options(config))]
    free += ["seed"] if config.model.weights == "pretrained" else []  # a random base depends on the seed
    free = [key for key in free if not (key == "pruning" and a.method == "adalora")]
    # LoRA+ passes the rate for embeddings as a multiple of the learning rate, and the multiple is part of the program.
    free = [key for key in free if not (key == "training.learning_rate" and config.training.loraplus_lr_ratio)]
    for key in free:
        section, _, name = key.rpartition(".")
        (values[section] if section else values).pop(name)
    return values


def _free_options(config: RunConfig) -> list[str]:
    a = config.adapter
    free = ["init_lora_weights", "init_weights"] if a.method in ("lora", "hira") else []
    free += ["dropout"] if a.method in ("lora", "hira", "vera") else []
    # A pattern's alpha belongs to the rank of the run by itself, not to the rank to which it is padded.
    free += ["rank"] if a.method in ("lora", "hira") and not a.rank_pattern and not a.alpha_pattern else []
    free += ["alpha"] if a.method == "lora" and not a.alpha_pattern else []
    return free


def chunked(runs: Sequence[T], most: int) -> list[list[T]]:
    """`runs` in pieces of at most `most` runs, with sizes as equal as possible."""
    pieces = -(-len(runs) // most)
    return [list(runs[i * len(runs) // pieces : (i + 1) * len(runs) // pieces]) for i in range(pieces)]
