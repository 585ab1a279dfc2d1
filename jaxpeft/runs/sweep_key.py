"""Decide which runs can train together in one program (`jaxpeft.runs.sweep`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jaxpeft.adapters import METHODS, HasConstants
from jaxpeft.config import AdapterConfig, ModelConfig, PruningConfig, RunConfig
from jaxpeft.config.adapter import redraws_entries
from jaxpeft.config.files import TOKEN_CACHE, flat
from jaxpeft.errors import InputError

T = TypeVar("T")

_STARTS_ON_ONE_BASE = (None, True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class SweepKey:
    """The values in which runs that train together must be equal.

    Attributes:
        reason: the reason for which the run can only train by itself; "" if it can train together with others.
        values: the resolved configuration without the keys in which runs that share a program may differ: name, token cache, seed,
            learning rate, pruning, and the options that the method shares (`Method.shareable`).
    """

    reason: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: RunConfig) -> SweepKey:
        """The key of the run that `config` describes."""
        a, values = config.adapter, config.resolved()
        method = METHODS.get(a.method)  # the baselines have none
        free = [
            "name",
            TOKEN_CACHE,
            *(f"adapter.{name}" for name in _free_options(a, method.shareable if method else ())),
        ]
        # A random base depends on the seed, and so may the constants of a method, which are frozen with the base.
        seeded = isinstance(method, type) and issubclass(method, HasConstants) and method.depends_on_seed(vars(a))
        free += ["seed"] if config.model.weights == "pretrained" and not seeded else []
        free += [] if method and method.allocated else ["pruning"]
        # LoRA+ passes the rate for embeddings as a multiple of the learning rate, and the multiple is part of the program.
        free += [] if config.training.loraplus_lr_ratio else ["training.learning_rate"]
        for key in free:
            section, _, name = key.rpartition(".")
            (values[section] if section else values).pop(name)
        return cls(_reason_to_train_alone(a, config.model, config.pruning, distributed=config.distributed), values)

    @property
    def text(self) -> str | None:
        """A text that is equal for runs that can train together, or None if the run can only train by itself."""
        return None if self.reason else json.dumps(self.values, sort_keys=True)


def sweep_key(config: RunConfig) -> str | None:
    """A text that is equal for runs that can share a program; None if the run can only train by itself."""
    return SweepKey.of(config).text


def check_shared_key(keys: Mapping[str, SweepKey]) -> None:
    """Check that the runs with these `keys`, by name, can share a program.

    Raises:
        InputError: they cannot. The message names the keys in which they differ and must not.
    """
    for name, key in keys.items():
        if key.reason:
            raise InputError(f"'{name}' cannot train together with other runs: {key.reason}; train it by itself")
    first_name, first_key = next(iter(keys.items()))
    first, missing = flat(first_key.values), object()
    for name, key in keys.items():
        other = flat(key.values)
        differ = sorted(key for key in first | other if first.get(key, missing) != other.get(key, missing))
        if differ:
            said = "; ".join(f"{key}: {first.get(key)} and {other.get(key)}" for key in differ)
            raise InputError(
                f"'{first_name}' and '{name}' cannot train together, because they differ in {said}; "
                "give them the same values, or train them one by one"
            )


def _reason_to_train_alone(a: AdapterConfig, model: ModelConfig, pruning: PruningConfig, *, distributed: bool) -> str:
    if a.method == "full":
        return "full fine-tuning freezes nothing that runs could share"
    if distributed:
        return "runs that train together use one process"
    if model.attention == "flash":
        return "flash attention's kernels cannot compute several runs at once (set model.attention to auto or dense)"
    if a.init_lora_weights not in _STARTS_ON_ONE_BASE:
        return f"adapter.init_lora_weights '{a.init_lora_weights}' gives every run a base of its own"
    if redraws_entries(a, pruning):
        return (
            f"pruning.schedule {pruning.schedule} redraws its entries, by gradients that only a run by itself computes"
        )
    return ""


def _free_options(a: AdapterConfig, shareable: Sequence[str]) -> list[str]:
    # A pattern's alpha is divided by the rank of the run by itself, not by the rank to which it is padded.
    fixed = {"rank": bool(a.rank_pattern or a.alpha_pattern), "alpha": bool(a.alpha_pattern)}
    return [option for option in shareable if not fixed.get(option)]


def chunked(runs: Sequence[T], most: int) -> list[list[T]]:
    """`runs` in pieces of at most `most` runs, with sizes as equal as possible."""
    pieces = -(-len(runs) // most)
    return [list(runs[i * len(runs) // pieces : (i + 1) * len(runs) // pieces]) for i in range(pieces)]
