"""The optimizer: AdamW with warm-up, clipping, accumulation and masked updates, all of it optax.

It is given the adapters alone. What is frozen is not differentiated, so no update of it can exist; what is pruned is held
at zero by the last link of the chain, after moments and weight decay have had their say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from jaxpeft.trees import Adapters, Layers


def learning_rate_schedule(
    peak: float | jax.Array, num_steps: int, warmup_steps: int, decay: Literal["linear", "cosine", "constant"]
) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, which may be traced, then `decay` to 0 at `num_steps` (or no decay): update → learning rate."""
    rest, highest = max(num_steps - warmup_steps, 1), cast(float, peak)  # optax's types know numbers alone
    after = {
        "linear": optax.linear_schedule(highest, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(highest, rest),
        "constant": optax.constant_schedule(highest),
    }[decay]
    return optax.join_schedules([optax.linear_schedule(0.0, highest, max(warmup_steps, 1)), after], [warmup_steps])


@dataclass(frozen=True)
class LoraPlus:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): factors on the learning rate, grouped as PEFT's `create_loraplus_optimizer` does.

    `ratio` for every vector and every B, but `embedding` for the matrices at the layers `embeddings`; 1 for all else.
    """

    ratio: float
    embedding: float = 1.0
    embeddings: frozenset[str] = frozenset()

    def factors(self, adapters: Adapters) -> Any:
        """The factor of every leaf: a tree of floats like `adapters`."""

        def factor(path: tuple, leaf: jax.Array) -> float:
            group, layer, name = (key.key for key in path)
            if leaf.ndim == 1:  # a magnitude too, also an embedding's
                return self.ratio
            if group == "sites" and layer in self.embeddings:
                return self.embedding
            return self.ratio if group == "sites" and name == "b" else 1.0

        return jax.tree_util.tree_map_with_path(factor, adapters)


def build_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    max_grad_norm: float,
    accumulation_steps: int = 1,
    lora_plus: LoraPlus | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW over `adapters`; its `update` takes the pruning masks as `masks=` (bool, True = keep; {} is dense).

    Args:
        schedule: update → learning rate.
        weight_decay: decoupled; biases and norms are spared (`optax.masked`'s mask).
        max_grad_norm: global norm to clip to; 0 leaves gradients as they are.
        accumulation_steps: passes whose gradients are averaged into one update.
        lora_plus: factors on the learning rate; None is one rate for all.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
        optax.adamw(schedule, weight_decay=weight_decay, mask=decayed),
        _scale_leaves(lora_plus.factors) if lora_plus else optax.identity(),
        hold_pruned_at_zero(),
    )
    if accumulation_steps == 1:
        return chain
    return optax.MultiSteps(chain, accumulation_steps).gradient_transformation()


def _scale_leaves(factors: Callable[[Adapters], Any]) -> optax.GradientTransformation:
    """Multiply every update, AdamW's decay included, by its leaf's factor: a learning rate of its own."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, factors(updates)))


def decayed(adapters: Adapters) -> Any:
    """Bool tree like `adapters`: True where weight decay applies."""
    spared = ("bias", "scale")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in spared, adapters)


def hold_pruned_at_zero() -> optax.GradientTransformationExtraArgs:
    """Project every update onto the masks: a pruned entry goes to zero and stays, whatever momentum and decay say.

    Masks are an argument of `update`, not part of the optimizer's state: the schedule that makes them lives outside.
    """

    def update(updates: Adapters, state: optax.EmptyState, params: Any, *, masks: Layers, **_: Any) -> tuple:
        assert params is not None, "the projection needs the parameters"
        sites = {
            path: {
                name: jnp.where(masks[path][name], u, -params["sites"][path][name])
                if name in masks.get(path, {})
                else u
                for name, u in group.items()
            }
            for path, group in updates["sites"].items()
        }
        return {**updates, "sites": sites}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
