"""Which runs can train together, in one program (`jaxpeft.runs.sweep`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

from jaxpeft.adapters import METHODS
from jaxpeft.config import RunConfig
from jaxpeft.config.files import resolved

T = TypeVar("T")

_STARTS_ON_ONE_BASE = (None, True, False, "gaussian", "orthogonal")


def sweep_key(config: RunConfig) -> str | None:
    """Runs of one key can train together; None: this run trains alone.

    They may differ in name, seed, learning rate and pruning, and in the options that the method shares (`Method.shareable`).
    """
    a = config.adapter
    if (
        a.method == "full"  # nothing is frozen, so nothing would be shared
        or config.distributed
        or config.model.attention == "flash"
        or a.init_lora_weights not in _STARTS_ON_ONE_BASE
    ):
        return None
    values = resolved(config)
    free = ["name", "pruning", "training.learning_rate", *(f"adapter.{name}" for name in _free_options(config))]
    free += ["seed"] if config.model.weights == "pretrained" else []  # a random base is another with another seed
    allocated = a.method in METHODS and METHODS[a.method].allocated
    free = [key for key in free if not (key == "pruning" and allocated)]
    # LoRA+'s rate for embeddings is told as a multiple of the other.
    free = [key for key in free if not (key == "training.learning_rate" and config.training.loraplus_lr_ratio)]
    for key in free:
        section, _, name = key.rpartition(".")
        (values[section] if section else values).pop(name)
    return json.dumps(values, sort_keys=True)


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
