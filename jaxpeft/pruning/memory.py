"""The memory of pruning between steps. It is a part of the training state, so a checkpoint brings it back exactly.

A run remembers only what its criterion and its schedule name; a run that needs nothing has {}. The keys decide what the
compiled step gathers:

- "gradient": the mean gradient of the last step, also for pruned entries, like the sites (SNIP, RigL).
- "movement": −Σ w·∂L/∂w over all micro-steps, like the sites (movement pruning).
- "rewound": the sites of an earlier step (iterative pruning).
- "soft": a bool scalar, True while masks act in the forward pass only (straight-through).
- "sensitivity", "uncertainty": AdaLoRA's importance (`allocation.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.trees import Layers

Memory = dict[str, Any]
"""Name → arrays; see the top of this file."""


def fresh_memory(names: Iterable[str], sites: Layers) -> Memory:
    """The memory before the first step: zeros, for "rewound" a copy of `sites`, for "soft" False."""
    made = {"rewound": lambda: jax.tree.map(jnp.copy, sites), "soft": lambda: jnp.zeros((), bool)}
    return {name: made.get(name, lambda: jax.tree.map(jnp.zeros_like, sites))() for name in sorted(names)}


def sees_pruned(memory: Memory) -> bool:
    """True if the step needs the gradients of pruned entries."""
    return "gradient" in memory or "soft" in memory


def gathered(memory: Memory, sites: Layers, grads: Layers, passes: jax.Array | int) -> Memory:
    """The memory after a micro-step with gradients `grads` at the weights `sites`.

    Args:
        memory: the memory before it.
        sites: the weights before the update.
        grads: like `sites`.
        passes: micro-steps of this step that came before.
    """
    memory = dict(memory)
    if "gradient" in memory:
        first, number = passes == 0, jnp.asarray(passes + 1, jnp.float32)
        memory["gradient"] = jax.tree.map(
            lambda mean, grad: jnp.where(first, grad, mean + (grad - mean) / number), memory["gradient"], grads
        )
    if "movement" in memory:
        memory["movement"] = jax.tree.map(lambda s, w, g: s - w * g, memory["movement"], sites, grads)
    return memory


def held(masks: Layers, memory: Memory) -> Layers:
    """The masks that hold entries at zero: `masks`, or none of them while masks are soft. True = keep."""
    return jax.tree.map(lambda mask: mask | memory["soft"], masks) if "soft" in memory else masks
