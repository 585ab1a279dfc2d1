"""AdaLoRA's budget: which triplets (aₖ, eₖ, bₖ) matter, and how many may live (Zhang et al. 2023, arXiv 2303.10512, section 3.3).

A weight's sensitivity is |w·∂L/∂w| (equation 8), smoothed over steps. Its uncertainty is the smoothed distance from that
mean (equations 9, 10). Its score is the product of the two. A triplet's score is the score of its singular value plus the
mean scores of its two vectors (equation 7).

At each allocation all triplets of all layers compete. Those above the threshold keep their singular value. The others'
is set to zero, and may grow again until the last allocation. The budget falls along a cubic (equation 11).

All of this is PEFT's RankAllocator, in its arithmetic. Parameters are `a: [d_in, r]`, `b: [r, d_out]`, `e: [1, r]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxpeft.trees import Layers

Importance = dict[str, Layers]
"""`{"sensitivity", "uncertainty"}`, each like the sites; {} if nothing is allocated."""


@dataclass(frozen=True)
class Allocation:
    """When ranks are allocated, and how many: from `init_r` a layer to `target_r` on average.

    The budget is whole until `begin_step` and falls until `last_step`. Between the two it is allocated after every step
    that `every_steps` divides, and for the last time at `last_step`. `beta1` and `beta2` smooth sensitivity and uncertainty.
    """

    init_r: int
    target_r: int
    begin_step: int
    last_step: int
    every_steps: int
    beta1: float
    beta2: float

    def budget_at(self, step: int, num_layers: int) -> int:
        """How many triplets may live after `step`, in `num_layers` layers together."""
        start, target = self.init_r * num_layers, self.target_r * num_layers
        if step <= self.begin_step:
            return start
        left = 1 - (step - self.begin_step) / (self.last_step - self.begin_step)
        return int((start - target) * max(left, 0.0) ** 3 + target)

    def due(self, step: int) -> bool:
        """True if triplets are chosen after `step`."""
        return step == self.last_step or (self.begin_step < step < self.last_step and step % self.every_steps == 0)


def fresh_importance(sites: Layers) -> Importance:
    """The importance before the first step: zeros like `sites`."""
    return {name: jax.tree.map(jnp.zeros_like, sites) for name in ("sensitivity", "uncertainty")}


def update_importance(
    importance: Importance, sites: Layers, grads: Layers, *, beta1: float, beta2: float
) -> Importance:
    """The importance after the step with gradients `grads` led to `sites`; `beta1` and `beta2` are the decays of its two means."""
    now = jax.tree.map(lambda p, g: jnp.abs(p * g), sites, grads)
    sensitivity = jax.tree.map(lambda s, i: beta1 * s + (1 - beta1) * i, importance["sensitivity"], now)
    uncertainty = jax.tree.map(
        lambda u, i, s: beta2 * u + (1 - beta2) * jnp.abs(i - s), importance["uncertainty"], now, sensitivity
    )
    return {"sensitivity": sensitivity, "uncertainty": uncertainty}


def triplet_scores(importance: Importance) -> dict[str, jax.Array]:
    """The score of every triplet: layer path → float `[r]`."""
    weights = jax.tree.map(jnp.multiply, importance["sensitivity"], importance["uncertainty"])
    return {path: w["e"][0] + (w["a"].mean(0) + w["b"].mean(1)) for path, w in weights.items()}


def keep_important(importance: Importance, budget: int | jax.Array) -> Layers:
    """Masks over `e: [1, r]` that keep the `budget` triplets with the highest scores of all layers; True = keep.

    Of several equal scores at the threshold none is kept, as in PEFT. `budget` may be traced.
    """
    scores = triplet_scores(importance)
    ascending = jnp.sort(jnp.concatenate(list(scores.values())))
    num_pruned = ascending.size - budget
    threshold = jnp.where(num_pruned > 0, ascending[jnp.maximum(num_pruned - 1, 0)], -jnp.inf)
    return {path: {"e": (score > threshold)[None]} for path, score in scores.items()}
