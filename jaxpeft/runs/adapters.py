"""Turn the adapter's flags into a method, the layers that it adapts, and initial adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import jax

from jaxpeft.adapters import METHODS, AdaLora, Ia3, Method, PromptTuning, S2ft, Site, SiteMethod
from jaxpeft.adapters.build import checked_options, init_adapters
from jaxpeft.calibration import calibrate
from jaxpeft.config import AdapterConfig
from jaxpeft.errors import InputError
from jaxpeft.families import FAMILIES, known, required
from jaxpeft.models.build import Model
from jaxpeft.models.heads import HEADS
from jaxpeft.targets import (
    check_patterns,
    default_feedforward,
    default_targets,
    match_modules,
    match_targets,
)
from jaxpeft.tasks.base import Batch, Task
from jaxpeft.training.micro_batches import divisor
from jaxpeft.training.objective import Objective
from jaxpeft.trees import Adapters, Params, leaf_paths, under

# Options that a method without them ignores, so that one config serves all methods.
_OF_ANY_METHOD = (
    *("method", "rank", "alpha", "dropout", "calibration_batches"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)


def build_method(adapter: AdapterConfig) -> Method | None:
    """The adapter method that the flags name, or None for the baselines.

    Raises:
        InputError: an option is set that the method does not have, or that does not fit another option.
    """
    a = adapter
    kind: Any = METHODS.get(a.method)  # the baselines have none
    options = {field.name for field in fields(kind)} if kind else set()
    given = {name: value for name, value in vars(a).items() if value is not None and name != "options"}
    for name, value in given.items():
        if name not in options and name not in _OF_ANY_METHOD:
            owners = [other for other, cls in METHODS.items() if name in {field.name for field in fields(cls)}]
            raise InputError(
                f"adapter.{name} {value!r} is an option of {', '.join(owners)}, and adapter.method is '{a.method}'; set it to null"
            )
    _check_places(a, kind, options)
    arguments = {name: value for name, value in given.items() if name in options}
    method = kind(**arguments, **_further_options(a, kind)) if kind else None
    if isinstance(method, AdaLora) and method.target_r > method.init_r:
        raise InputError(
            f"adapter.target_r is {method.target_r}; for AdaLoRA it must be from 0 to adapter.init_r ({method.init_r})"
        )
    if a.prompt_tuning_init_text and a.prompt_tuning_init != "TEXT":
        raise InputError("adapter.prompt_tuning_init_text needs adapter.prompt_tuning_init TEXT")
    if a.block_size is not None and a.mask_type != "block":
        raise InputError(
            f"adapter.block_size {a.block_size} needs adapter.mask_type block, but it is {a.mask_type or 'random'}"
        )
    chosen = a.mask_type or a.selection or "random"
    if a.random_seed is not None and chosen != "random":
        raise InputError(
            f"adapter.random_seed {a.random_seed} is for random entries, not for '{chosen}'; set it to null"
        )
    for start in ("loftq", "eva", "lora_ga"):
        if getattr(a, f"{start}_config") and a.init_lora_weights != start:
            raise InputError(
                f"adapter.{start}_config needs adapter.init_lora_weights {start}, but it is {a.init_lora_weights}"
            )
    return method


def _further_options(a: AdapterConfig, kind: Any) -> dict[str, Any]:
    """The checked values of `adapter.options`, which sets the options that have no flag of their own."""
    for name, value in (a.options or {}).items():
        if kind is None:
            raise InputError(
                f"adapter.options has '{name}', but adapter.method '{a.method}' has no options; set it to null"
            )
        if hasattr(a, name):
            raise InputError(f"adapter.options has '{name}', which has a flag of its own: set adapter.{name} {value}")
    return checked_options(kind, a.options, "adapter.options") if a.options else {}


def _check_places(a: AdapterConfig, kind: Any, options: set[str]) -> None:
    """Raise InputError if layers are chosen for a method that has no such choice.

    The baselines accept a choice and ignore it, because they share their configs with other methods.
    """
    chooses = kind is None or (issubclass(kind, SiteMethod) and not kind.word_embeddings_only)
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = getattr(a, name)
        if value is not None and not chooses and name not in options:
            raise InputError(
                f"adapter.{name} {value!r} cannot be used with {a.method}, whose layers cannot be chosen; set it to null"
            )


def fully_trained(adapter: AdapterConfig, task: Task, leaves: Sequence[str], base_prefix: str) -> set[str]:
    """The paths of the fully trained leaves: those of `modules_to_save`, the task's head (as in PEFT), and the baselines' own.

    Raises:
        InputError: the head of a classifier is not known.
    """
    if adapter.method == "full":
        return set(leaves)
    chosen = match_modules(leaves, adapter.modules_to_save or [])
    outside = {leaf for leaf in leaves if not under(leaf, [base_prefix])}
    if task.trains_head:
        names = set(HEADS[task.head].modules or chain.from_iterable(known("classifier_heads").values()))
        heads = sorted(name for name in names if any(name in leaf for leaf in outside))
        if not heads and not chosen & outside:
            raise InputError(
                f"none of {', '.join(sorted(outside))} is a classifier's head that jaxpeft knows ({', '.join(sorted(names))}); "
                "name the head with adapter.modules_to_save"
            )
        return chosen | match_modules(outside, heads)
    return chosen | outside if adapter.method == "head" else chosen


@dataclass(frozen=True)
class Adapted:
    """A base with its initial adapters.

    Attributes:
        frozen: the base's parameters without the fully trained ones.
        adapters: the initial adapters, with the fully trained parameters.
        method: the method with every option set; None for the baselines.
        target_modules: the names of the adapted layers in the exported config; None for the baselines.
    """

    frozen: Params
    adapters: Adapters
    method: Method | None
    target_modules: str | list[str] | None


def prepare_adapters(
    adapter: AdapterConfig,
    method: Method | None,
    task: Task,
    model: Model,
    *,
    seed: int,
    tokenizer: Any = None,
    tokenizer_name: str | None = None,
    batches: Callable[[int], Batch] | None = None,
) -> Adapted:
    """Choose the layers, and draw their initial adapters from the run's seed.

    Args:
        adapter: the flags from which `method` was built. They choose the layers.
        method: the adapter method; None for the baselines.
        task: the task, whose head may be fully trained.
        model: the base.
        seed: the run's seed.
        tokenizer: needed if a prompt is initialised from a text.
        tokenizer_name: its hub id or directory, if it is not the model's own.
        batches: micro-step → training batch; needed if the initialisation reads data.

    Raises:
        InputError: a name matches nothing, or the rank exceeds a layer's width.
    """
    a, method = adapter, _completed(method, adapter, model, tokenizer, tokenizer_name)
    sites, leaves = model.sites(), list(leaf_paths(model.params))
    whole = fully_trained(a, task, leaves, model.base_prefix) | set(model.missing)
    names = _target_names(a, method, model)
    targets: dict[str, Site] = {}
    if isinstance(method, SiteMethod):
        if not names:
            raise InputError(
                f"{method.name} has no default target modules for '{model.model_type}', only for "
                f"{', '.join(name for name in FAMILIES if default_targets(method.name, name))}; "
                "name some with adapter.target_modules"
            )
        targets = match_targets(
            sites,
            names,
            exclude_modules=a.exclude_modules,
            layers_to_transform=a.layers_to_transform,
            layers_pattern=a.layers_pattern,
            fully_trained_layers={leaf.rpartition("/")[0] for leaf in whole},
        )
        for option in ("rank_pattern", "alpha_pattern"):
            check_patterns(getattr(a, option) or {}, targets, f"adapter.{option}")
    statistics = None
    if isinstance(method, SiteMethod) and method.statistics:
        assert batches is not None, "an initialisation that looks at data needs batches"
        seen = [batches(i) for i in range(a.calibration_batches)]
        found = calibrate(model, method, targets, seen, loss=_base_loss(model, task))
        method, targets, statistics = found.method, found.targets, found.statistics
        if a.init_lora_weights == "eva":
            names = [path.replace("/", ".") for path in targets]  # EVA gives some layers no rank
    if method:
        whole |= method.fully_trained(leaves, targets)
    key = jax.random.fold_in(jax.random.key(seed), 0)
    frozen, adapters = init_adapters(model.params, method, targets, rng=key, fully_trained=whole, statistics=statistics)
    return Adapted(frozen, adapters, method, names if method else None)


def _base_loss(model: Model, task: Task) -> Callable[[Params, Batch], jax.Array]:
    """The mean loss of the model without an adapter, as a function of its parameters."""
    objective = Objective(model, None, task)

    def loss(params: Params, batch: Batch) -> jax.Array:
        total, weight = objective.loss(objective.logits(params, {"sites": {}, "modules": {}}, {}, batch), batch)
        return total / divisor(weight)

    return loss


def _target_names(adapter: AdapterConfig, method: Method | None, model: Model) -> str | list[str]:
    if isinstance(method, SiteMethod) and method.word_embeddings_only:
        return [required(model.family, "word_embeddings", method.name)]
    return adapter.target_modules or list(default_targets(method.name, model.model_type) if method else ())


def _completed(
    method: Method | None, adapter: AdapterConfig, model: Model, tokenizer: Any, tokenizer_name: str | None
) -> Method | None:
    """`method` with the options that depend on the model and its tokenizer."""
    if isinstance(method, Ia3) and adapter.feedforward_modules is None:
        return replace(method, feedforward_modules=default_feedforward(model.model_type))
    if isinstance(method, S2ft):
        heads = adapter.attention_modules
        if heads is None:
            heads = list(model.family.default_targets.get("attention_output", ()))
        return replace(
            method, attention_modules=heads, head_dim=model.config.hidden_size // model.config.num_attention_heads
        )
    if isinstance(method, PromptTuning) and method.prompt_tuning_init_text:
        assert tokenizer is not None, "a prompt that starts from a text needs the tokenizer"
        name = tokenizer_name or model.source.hub_id or str(model.source.directory)
        ids = tokenizer(method.prompt_tuning_init_text)["input_ids"]
        return replace(method, init_token_ids=tuple(ids), tokenizer_name_or_path=name)
    return method
