"""Pruning criteria: how much each adapter parameter matters. The entries with the lowest scores are pruned.

A new criterion is a function that implements `Criterion`, in a file of its own, and a line in `jaxpeft.pruning.SCORES`.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxpeft.trees import Layers


class Criterion(Protocol):
    """A pure, jittable function: adapter parameters → one score for each entry.

    Entries are compared within a tensor, never between tensors: (A/c, cB) is the same adapter for every c, so the
    scores of A and B have no common unit.
    """

    def __call__(self, sites: Layers, **context: Any) -> Layers:
        """Scores like `sites` (same paths, names and shapes, any float dtype); a higher score is kept longer.

        Args:
            sites: the adapter's parameters, layer path → name → array.
            **context: what else a caller knows, by name. A criterion names the keywords it needs and ignores the rest.
                Today no caller passes any.
        """


def magnitude(sites: Layers, **context: Any) -> Layers:
    """Score |w| (Zhu & Gupta 2017, arXiv 1710.01878): small weights change the output least."""
    return jax.tree.map(jnp.abs, sites)
