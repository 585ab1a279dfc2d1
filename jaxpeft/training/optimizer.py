"""The optimizer: AdamW with warm-up, clipping, accumulation and masked updates, all of it optax.

It sees only the adapters. Frozen parameters are not differentiated, so they have no updates. The last link of the chain holds
pruned entries at zero, after moments and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax

from jaxpeft.errors import check_choice
from jaxpeft.trees import Adapters, Layers


def learning_rate_schedule(
    peak: float | jax.Array, num_steps: int, warmup_steps: int, decay: Literal["linear", "cosine", "constant"]
) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0 to `peak`, then `decay` to 0 at `num_steps` (or no decay).

    `peak` may be a traced array, so that one program serves replicas with different rates.

    Raises:
        InputError: there is no such decay.
    """
    rest, highest = max(num_steps - warmup_steps, 1), cast(float, peak)  # optax declares its rates as float only
    after = {
        "linear": optax.linear_schedule(highest, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(highest, rest),
        "constant": optax.constant_schedule(highest),
    }
    check_choice("training.schedule", decay, after)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, highest, max(warmup_steps, 1)), after[decay]], [warmup_steps]
    )


# Flax's names for the biases of all layers and for the scales of layer norms. Fully trained parameters have Flax's names only.
_UNDECAYED_MODULES = ("bias", "scale")


@dataclass(frozen=True)
class LoraPlus:
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): factors on the learning rate, grouped as PEFT's `create_loraplus_optimizer` does.

    Attributes:
        ratio: the factor for every vector, and for the matrices `parameters` of the sites.
        parameters: names of these matrices (`Method.loraplus`).
        embedding: the factor for the matrices of the sites `embeddings`.
        embeddings: layer paths of the adapted embeddings.

    The factor is 1 for every other parameter.
    """

    ratio: float
    parameters: Collection[str]
    embedding: float = 1.0
    embeddings: frozenset[str] = frozenset()

    def factors(self, adapters: Adapters) -> Any:
        """The factor of every leaf: a tree of floats like `adapters`."""

        def factor(path: tuple, leaf: jax.Array) -> float:
            group, layer, name = (key.key for key in path)
            if leaf.ndim == 1:  # PEFT's rule: every vector, also the magnitude of an embedding
                return self.ratio
            if group == "sites" and layer in self.embeddings:
                return self.embedding
            return self.ratio if group == "sites" and name in self.parameters else 1.0

        return jax.tree_util.tree_map_with_path(factor, adapters)


def build_optimizer(
    schedule: optax.Schedule,
    *,
    weight_decay: float,
    max_grad_norm: float,
    accumulation_steps: int = 1,
    undecayed: Collection[str] = (),
    lora_plus: LoraPlus | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW over `adapters`; its `update` takes the pruning masks as `masks=` (bool, True = keep; {} is dense).

    Args:
        schedule: step → learning rate.
        weight_decay: decoupled; not applied to biases and norms (`decayed`).
        max_grad_norm: global norm to clip to; 0 leaves gradients as they are.
        accumulation_steps: micro-steps whose gradients are averaged into one step.
        undecayed: names of the parameters at the sites to which weight decay is not applied (`Method.undecayed`).
        lora_plus: factors on the learning rate; None is one rate for all.
        thresholds: parameters at the sites with a soft threshold after every step (`Method.thresholds`).
    """
    chain = optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
        optax.adamw(schedule, weight_decay=weight_decay, mask=partial(decayed, undecayed=undecayed)),
        _scale_leaves(lora_plus.factors) if lora_plus else optax.identity(),
        hold_pruned_at_zero(),
        *([soft_threshold(thresholds)] if thresholds else []),
    )
    if accumulation_steps == 1:
        return chain
    return optax.MultiSteps(chain, accumulation_steps).gradient_transformation()


def _scale_leaves(factors: Callable[[Adapters], Any]) -> optax.GradientTransformation:
    """Multiply every update, AdamW's decay included, by its leaf's factor, which gives the leaf its own learning rate."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, factors(updates)))


def decayed(adapters: Adapters, *, undecayed: Collection[str] = ()) -> Any:
    """Bool tree like `adapters`: True for every leaf to which weight decay applies.

    It does not apply to the parameters at the sites that `undecayed` names, nor to the fully trained biases and norms.
    """
    spared = {"sites": undecayed, "modules": _UNDECAYED_MODULES}
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in spared[path[0].key], adapters)


def soft_threshold(thresholds: Mapping[str, float]) -> optax.GradientTransformation:
    """The proximal step of λ·‖w‖₁: after the update, w moves by λ towards zero and stops there, for the parameters `thresholds`.

    λ is the threshold itself, not its product with the learning rate.
    """

    def update(updates: Adapters, params: Any) -> Adapters:
        assert params is not None, "the threshold needs the parameters"

        def of(name: str, u: jax.Array, w: jax.Array) -> jax.Array:
            if name not in thresholds:
                return u
            moved = w + u
            return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - thresholds[name], 0) - w

        sites = {
            path: {name: of(name, u, params["sites"][path][name]) for name, u in group.items()}
            for path, group in updates["sites"].items()
        }
        return {**updates, "sites": sites}

    return optax.stateless(update)


def fresh_moments(opt_state: Any, fresh: Layers) -> Any:
    """The optimizer's state with Adam's moments at zero for the entries at the sites that `fresh` names (bool, True = fresh).

    Adam's step count stays, because all entries share it.
    """

    def reset(moments: Adapters) -> Adapters:
        sites = jax.tree.map(lambda new, moment: jnp.where(new, 0, moment), fresh, moments["sites"])
        return {**moments, "sites": sites}

    def of(node: Any) -> Any:
        return node._replace(mu=reset(node.mu), nu=reset(node.nu)) if isinstance(node, optax.ScaleByAdamState) else node

    return jax.tree.map(of, opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState))


def hold_pruned_at_zero() -> optax.GradientTransformationExtraArgs:
    """Project every update onto the masks: a pruned entry goes to zero and stays there, despite momentum and decay.

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
