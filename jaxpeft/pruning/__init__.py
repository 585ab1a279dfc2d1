"""Which adapter parameters exist: criteria, schedules and masks as pure functions and values.

Nothing is imported before its first use: the configuration reads the names of the two tables, and must not load jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxpeft.registry import Registry

if TYPE_CHECKING:
    from jaxpeft.pruning.masks import apply_masks as apply_masks
    from jaxpeft.pruning.masks import num_kept as num_kept
    from jaxpeft.pruning.masks import prune as prune
    from jaxpeft.pruning.masks import sparsity_of as sparsity_of
    from jaxpeft.pruning.masks import tighten as tighten
    from jaxpeft.pruning.schedules import Cubic as Cubic
    from jaxpeft.pruning.schedules import OneShot as OneShot
    from jaxpeft.pruning.schedules import Schedule as Schedule
    from jaxpeft.pruning.scores import Criterion as Criterion
    from jaxpeft.pruning.scores import magnitude as magnitude

SCHEDULES = Registry(
    "pruning schedule",
    {
        "one-shot": "jaxpeft.pruning.schedules:OneShot",
        "cubic": "jaxpeft.pruning.schedules:Cubic",
    },
)
"""`--pruning.schedule` → a class that implements `Schedule`."""

SCORES = Registry("pruning criterion", {"magnitude": "jaxpeft.pruning.scores:magnitude"})
"""`--pruning.criterion` → a function that implements `Criterion`."""

_PUBLIC = {
    "Criterion": "scores",
    "Cubic": "schedules",
    "OneShot": "schedules",
    "Schedule": "schedules",
    "apply_masks": "masks",
    "magnitude": "scores",
    "num_kept": "masks",
    "prune": "masks",
    "sparsity_of": "masks",
    "tighten": "masks",
}


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
