"""Which adapter parameters exist: masks, scores and schedules as pure functions."""

from jaxpeft.pruning.masks import apply_masks, magnitude_masks, num_kept, prune, sparsity_of
from jaxpeft.pruning.schedules import Cubic, OneShot, Schedule

__all__ = ["Cubic", "OneShot", "Schedule", "apply_masks", "magnitude_masks", "num_kept", "prune", "sparsity_of"]
