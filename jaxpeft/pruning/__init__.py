"""Which adapter parameters exist: criteria, schedules and masks as pure functions and values.

Nothing is imported before its first use: the configuration reads the names of the two tables, and must not load jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxpeft.registry import Registry

if TYPE_CHECKING:
    from jaxpeft.pruning.masks import apply_masks as apply_masks
    from jaxpeft.pruning.masks import prune as prune
    from jaxpeft.pruning.masks import sparsity_of as sparsity_of
    from jaxpeft.pruning.masks import tighten as tighten
    from jaxpeft.pruning.schedules import Cubic as Cubic
    from jaxpeft.pruning.schedules import OneShot as OneShot
    from jaxpeft.pruning.schedules import Schedule as Schedule
    from jaxpeft.pruning.scores import Criterion as Criterion
    from jaxpeft.pruning.scores import magnitude as magnitude
    from jaxpeft.pruning.selection import Selection as Selection
    from jaxpeft.pruning.structures import num_kept as num_kept
    from jaxpeft.pruning.structures import structure_of as structure_of
    from jaxpeft.pruning.updates import Pruner as Pruner

SCHEDULES = Registry(
    "pruning schedule",
    {
        "one-shot": "jaxpeft.pruning.schedules:OneShot",
        "cubic": "jaxpeft.pruning.schedules:Cubic",
        "at-start": "jaxpeft.pruning.at_start:AtStart",
        "iterative": "jaxpeft.pruning.iterative:Iterative",
        "rigl": "jaxpeft.pruning.rewire:RigL",
        "set": "jaxpeft.pruning.rewire:Set",
        "straight-through": "jaxpeft.pruning.straight_through:StraightThrough",
    },
)
"""`--pruning.schedule` → a class that implements `Schedule`."""

SCORES = Registry(
    "pruning criterion",
    {
        "magnitude": "jaxpeft.pruning.scores:magnitude",
        "product": "jaxpeft.pruning.scores:product",
        "snip": "jaxpeft.pruning.scores:snip",
        "movement": "jaxpeft.pruning.scores:movement",
        "random": "jaxpeft.pruning.scores:random",
    },
)
"""`--pruning.criterion` → a `Criterion`."""

_PUBLIC = {
    "Criterion": "scores",
    "Cubic": "schedules",
    "OneShot": "schedules",
    "Pruner": "updates",
    "Schedule": "schedules",
    "Selection": "selection",
    "apply_masks": "masks",
    "magnitude": "scores",
    "num_kept": "structures",
    "prune": "masks",
    "sparsity_of": "masks",
    "structure_of": "structures",
    "tighten": "masks",
}


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
