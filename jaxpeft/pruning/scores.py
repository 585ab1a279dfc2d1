"""Pruning criteria: how much each adapter parameter matters. The entries with the lowest scores are pruned.

A new criterion is a `Criterion` in a file of its own, and a line in `jaxpeft.pruning.SCORES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.pruning.memory import Memory
from jaxpeft.pruning.structures import Combine
from jaxpeft.trees import Layers

Effects = Callable[[dict[str, jax.Array]], dict[str, jax.Array]]
"""A layer's parameters, name → array → by how much its update changes if an entry is set to zero (`Method.entry_effects`)."""


@dataclass(frozen=True)
class Criterion:
    """A pure function that jit can compile: adapter parameters → one score for each entry. Use it as a decorator.

    Attributes:
        score: the function. It takes the sites and keywords, of which it names those that it needs and ignores the rest:
            `memory`: what the run has gathered (`jaxpeft.pruning.memory`), `rng`: a typed key, the same at every pruning of a
            run, `effects`: a layer's parameters → by how much the update changes without each entry, or None. It returns scores like the
            sites (same paths, names and shapes, float32); a higher score is kept longer.
        comparable: True if scores of different tensors have a common unit, so that they may compete (`Selection.scope`).
            (A/c, cB) is the same adapter for every c, so such a score must not change with c.
        remembers: what the score reads from the memory: "gradient", "movement", or None.
        combine: how the entries' scores make the score of a whole rank: "sum", or "norms": ‖a_k‖·‖b_k‖ of the scores.
        needs_effects: True if the score needs `effects`.
    """

    score: Callable[..., Layers]
    comparable: bool = False
    remembers: str | None = None
    combine: Combine = "sum"
    needs_effects: bool = False

    def __call__(self, sites: Layers, **context: Any) -> Layers:
        """The scores of `sites`: layer path → name → array."""
        return self.score(sites, **context)


@partial(Criterion, combine="norms")
def magnitude(sites: Layers, **context: Any) -> Layers:
    """Score |w| (Zhu & Gupta 2017, arXiv 1710.01878): small weights change the output least.

    |w| has no common unit between tensors. A whole rank scores ‖a_k‖·‖b_k‖, which has one if the
    update is that product alone.
    """
    return jax.tree.map(jnp.abs, sites)


@partial(Criterion, comparable=True, combine="norms", needs_effects=True)
def product(sites: Layers, *, effects: Effects | None = None, **context: Any) -> Layers:
    """Score ‖ΔW − ΔW′‖: by how much the update ΔW changes (its Frobenius norm) if the entry is set to zero.

    For a product A·B it is |A_jk|·‖B_k·‖ and |B_ki|·‖A_·k‖; each method has its own (`jaxpeft.adapters.entry_effects`). (A/c, cB) has
    the same scores, so all entries may compete. For a whole rank the norms make the square of what the update loses with it.
    """
    if effects is None:
        raise InputError(
            "pruning.criterion product needs to know how entries change the update: give effects=, such as Lora.entry_effects"
        )
    return {path: effects(group) for path, group in sites.items()}


@partial(Criterion, comparable=True, remembers="gradient")
def snip(sites: Layers, *, memory: Memory | None = None, **context: Any) -> Layers:
    """Score |w·∂L/∂w| at one moment: by how much the loss changes to first order (SNIP; Lee et al. 2019, arXiv 1810.02340, eq. 4).

    The gradient is the mean of the last step's micro-steps; the weights are those after that step. The paper prunes before the
    first step. There B = 0 makes every score of an adapter zero, so prune later.
    """
    return jax.tree.map(lambda w, g: jnp.abs(w * g), sites, _remembered(memory, "gradient"))


@partial(Criterion, comparable=True, remembers="movement")
def movement(sites: Layers, *, memory: Memory | None = None, **context: Any) -> Layers:
    """Score −Σ w·∂L/∂w over all steps so far: weights that grow are kept (Sanh et al. 2020, arXiv 2005.07683, eq. 2).

    With the schedule straight-through this is the paper's method. With the others a pruned entry gathers nothing more. Each
    micro-step counts, so the scores are `accumulation_steps` times the paper's, which changes no order.
    """
    return _remembered(memory, "movement")


def _remembered(memory: Memory | None, name: str) -> Layers:
    if memory is None or name not in memory:
        raise InputError(
            "this pruning criterion needs the gradients of a run: prune while training, with pruning.criterion"
        )
    found: Layers = memory[name]
    return found


@partial(Criterion, comparable=True)
def random(sites: Layers, *, rng: jax.Array | None = None, **context: Any) -> Layers:
    """Score uniform in [0, 1), drawn once for a run: the baseline that a criterion must beat.

    The draw of an entry depends on the key, the tensor and the entry's place only. So a run that is padded because it trains
    together with others draws as it does alone, and a growing sparsity prunes more of the same order.
    """
    if rng is None:
        raise InputError("the pruning criterion random needs a key: give rng=")
    seed = jax.random.bits(rng, dtype=jnp.uint32)  # threefry, because rbg draws by the shape
    key = jax.random.key(seed, impl="threefry2x32")

    leaves, tree = jax.tree.flatten(sites)
    # All entries of all tensors in one call: a call for each tensor takes several times as long to compile.
    places = jnp.concatenate([_places(number, leaf.shape) for number, leaf in enumerate(leaves)])
    keys = jax.vmap(partial(jax.random.fold_in, key))(places[:, 0])
    for axis in (1, 2):
        keys = jax.vmap(jax.random.fold_in)(keys, places[:, axis])
    parts = jnp.split(jax.vmap(jax.random.uniform)(keys), np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])


def _places(number: int, shape: tuple[int, ...]) -> jax.Array:
    """`(number, row, column)` of every entry of a tensor, `[entries, 3]`; a vector is a row."""
    rows = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape)[-2:], 0).reshape(-1)
    columns = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape)[-2:], 1).reshape(-1)
    return jnp.stack([jnp.full_like(rows, number), rows, columns], axis=1)
