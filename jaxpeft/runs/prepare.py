"""From a configuration to the parts of a run: data, model, adapters. Shared by training and by the commands on finished runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpeft.adapters import METHODS, AdaLora, Ia3, Lora, Method, PromptTuning, Site, SiteMethod
from jaxpeft.adapters.build import init_adapters
from jaxpeft.calibration import calibrate
from jaxpeft.config import AdapterConfig, RunConfig
from jaxpeft.data import (
    GLUE,
    ClassificationData,
    MaskedLMData,
    PackedData,
    Split,
    Splits,
    classification_data,
    load_splits,
    masked_lm_data,
)
from jaxpeft.errors import InputError
from jaxpeft.families import FAMILIES, known, required
from jaxpeft.models.attention import check_packing
from jaxpeft.models.build import Model, Quantization, load_model, load_tokenizer
from jaxpeft.models.inputs import max_tokens
from jaxpeft.models.shapes import model_shapes
from jaxpeft.models.sources import resolve
from jaxpeft.targets import check_patterns, default_feedforward, default_targets, match_modules, match_targets
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.loop import Plan
from jaxpeft.training.objective import Batch, Objective
from jaxpeft.training.optimizer import LoraPlus, build_optimizer
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import TrainState, init_state
from jaxpeft.trees import Adapters, Params, leaf_paths

Data = MaskedLMData | ClassificationData
TrainingData = Data | PackedData


def prepare_splits(config: RunConfig) -> Splits:
    """Read the texts and labels that `config.data` names.

    Raises:
        InputError: as `load_splits`, and for a classification without labels.
    """
    data = config.data
    splits = load_splits(
        data.name,
        subset=data.subset,
        train_file=data.train_file,
        validation_file=data.validation_file,
        test_file=data.test_file,
        column_names=data.column_names,
        text_column=data.text_column,
        text_pair_column=data.text_pair_column,
        label_column=data.label_column,
        use_labels=config.task == "classification",
    )
    if config.task == "classification" and splits.num_labels is None:
        raise InputError(
            f"classification needs labels, and {splits.source} has none; name their column with data.label_column"
        )
    for split in (splits.validation, splits.test):
        if splits.num_labels == 1 and split is not None and len(split) < 2:
            raise InputError(
                f"{splits.source} leaves 1 row to judge a regression by, and a correlation needs two; add rows"
            )
    return splits


def prepare_model(config: RunConfig, num_labels: int | None) -> tuple[Model, Any]:
    """Load the base and its tokenizer.

    Raises:
        InputError: as `load_model`, and for rows longer than the model's positions.
    """
    m = config.model
    model = load_model(m.name, config.task, **_model_options(config, num_labels), seed=config.seed)
    _check_length(config, model)
    tokenizer = load_tokenizer(resolve(m.tokenizer).directory if m.tokenizer else model.source.directory)
    if len(tokenizer) > model.config.vocab_size:
        # An index behind the table's end would be clamped in silence.
        raise InputError(
            f"the tokenizer {m.tokenizer or m.name} has {len(tokenizer)} tokens and the model embeddings for "
            f"{model.config.vocab_size}; name the model's own with model.tokenizer"
        )
    return model, tokenizer


def prepare_model_shapes(config: RunConfig, num_labels: int | None) -> Model:
    """The base as `prepare_model` loads it, with shapes in the place of weights and no tokenizer.

    Raises:
        InputError: as `prepare_model`.
    """
    model = model_shapes(config.model.name, config.task, **_model_options(config, num_labels))
    _check_length(config, model)
    return model


def _model_options(config: RunConfig, num_labels: int | None) -> dict[str, Any]:
    m = config.model
    scheme = (
        Quantization(m.quantization, m.quantization_block_size, m.double_quantization)
        if m.quantization != "none"
        else None
    )
    return {
        "weights": m.weights,
        "num_labels": num_labels,
        "dtype": m.dtype,
        "dropout": m.dropout,
        "gradient_checkpointing": m.gradient_checkpointing,
        "quantization": scheme,
        "trained_leaves": lambda leaves, base_prefix: fully_trained(config, leaves, base_prefix),
    }


def _check_length(config: RunConfig, model: Model) -> None:
    method = build_method(config)
    virtual = method.virtual_tokens if isinstance(method, SiteMethod) else 0
    limit = max_tokens(model.config) - virtual
    if config.data.max_length > limit:
        besides = f" besides adapter.num_virtual_tokens {virtual}" if virtual else ""
        raise InputError(
            f"data.max_length {config.data.max_length} exceeds the {limit} positions of {config.model.name}{besides}; give at most {limit}"
        )


def prepare_data(config: RunConfig, split: Split, tokenizer: Any, batch_size: int) -> Data:
    """Tokenise a split into batches of one shape (masked-lm) or of a few (classification)."""
    data = config.data
    if config.task == "masked-lm":
        return masked_lm_data(
            split.texts,
            tokenizer,
            length=data.max_length,
            batch_size=batch_size,
            seed=config.seed,
            ratio=data.mask_ratio,
        )
    return classification_data(
        split.texts,
        split.pairs,
        split.labels,
        tokenizer,
        max_length=data.max_length,
        batch_size=batch_size,
        seed=config.seed,
        bucket_lengths=data.bucket_lengths,
    )


def prepare_training_data(
    config: RunConfig, split: Split, model: Model, tokenizer: Any, num_devices: int
) -> TrainingData:
    """`prepare_data` in batches of `training.batch_size`; with `data.packing` several texts to a row.

    Raises:
        InputError: for packing where the attention of `model` is not known.
    """
    data = prepare_data(config, split, tokenizer, config.training.batch_size)
    if not config.data.packing:
        return data
    check_packing(model)
    assert isinstance(data, ClassificationData), "the configuration packs classification only"
    return PackedData(data, config.data.max_length, num_devices)


def fully_trained(config: RunConfig, leaves: Sequence[str], base_prefix: str) -> set[str]:
    """Return the leaf paths of fully trained parameters: modules_to_save, a classifier's head (as in PEFT), the baselines' own.

    Raises:
        InputError: if the head of a classifier is not known.
    """
    if config.adapter.method == "full":
        return set(leaves)
    chosen = match_modules(leaves, config.adapter.modules_to_save or [])
    outside = {leaf for leaf in leaves if not leaf.startswith(base_prefix + "/")}
    if config.task == "classification":
        names = {name for heads in known("classifier_heads").values() for name in heads}
        heads = sorted(name for name in names if any(name in leaf for leaf in outside))
        if not heads and not chosen & outside:
            raise InputError(
                f"none of {', '.join(sorted(outside))} is a classifier's head that jaxpeft knows ({', '.join(sorted(names))}); "
                "name the head with adapter.modules_to_save"
            )
        return chosen | match_modules(outside, heads)
    return chosen | outside if config.adapter.method == "head" else chosen


def build_method(config: RunConfig) -> Method | None:
    """The adapter method that `config.adapter` names; None for the baselines.

    Raises:
        InputError: for an option that is set and that the method does not have.
    """
    a = config.adapter
    kind: Any = METHODS.get(a.method)
    options = {field.name for field in fields(kind)} if kind else set()
    given = {name: value for name, value in vars(a).items() if value is not None}
    for name, value in given.items():
        if name not in options and name not in _OF_ANY_METHOD:
            owners = [other for other, cls in METHODS.items() if name in {field.name for field in fields(cls)}]  # type: ignore[arg-type]
            raise InputError(
                f"adapter.{name} {value!r} is an option of {', '.join(owners)}, and adapter.method is '{a.method}'; set it to null"
            )
    _check_places(a, kind, options)
    method = kind(**{name: value for name, value in given.items() if name in options}) if kind else None
    if isinstance(method, AdaLora) and method.target_r > method.init_r:
        raise InputError(
            f"adapter.target_r is {method.target_r}; for AdaLoRA it must be from 0 to init_r ({method.init_r})"
        )
    if a.prompt_tuning_init_text and a.prompt_tuning_init != "TEXT":
        raise InputError("adapter.prompt_tuning_init_text needs adapter.prompt_tuning_init TEXT")
    for start in ("loftq", "eva", "lora_ga"):
        if getattr(a, f"{start}_config") and a.init_lora_weights != start:
            raise InputError(
                f"adapter.{start}_config needs adapter.init_lora_weights {start}, which is {a.init_lora_weights}"
            )
    return method


def _check_places(a: AdapterConfig, kind: Any, options: set[str]) -> None:
    """Refuse a choice of layers for a method that has none; the baselines share their configs with other methods."""
    chooses = kind is None or (issubclass(kind, SiteMethod) and not kind.word_embeddings_only)
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = getattr(a, name)
        if value is not None and not chooses and name not in options:
            raise InputError(
                f"adapter.{name} {value!r} is not for {a.method}, which adapts no layers of choice; set it to null"
            )


# What is no field of a method, or says nothing wrong where it is none: one config serves for every method.
_OF_ANY_METHOD = (
    *("method", "rank", "alpha", "dropout", "calibration_batches"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)


@dataclass(frozen=True)
class Adapted:
    """A base with fresh adapters, and the names that its exported config will say."""

    frozen: Params
    adapters: Adapters
    method: Method | None
    target_modules: str | list[str] | None


def prepare_adapters(
    config: RunConfig, model: Model, tokenizer: Any = None, batches: Callable[[int], Batch] | None = None
) -> Adapted:
    """Choose the layers, and draw their adapters from the run's seed.

    `tokenizer` is for a prompt that starts from a text, and `batches` (pass → training batch) for the starts that look at data.

    Raises:
        InputError: where a name matches nothing, or the rank exceeds a layer's width.
    """
    a, method = config.adapter, _completed(build_method(config), config, model, tokenizer)
    sites, leaves = model.sites(), list(leaf_paths(model.params))
    whole = fully_trained(config, leaves, model.base_prefix) | set(model.missing)
    names = _target_names(config, method, model)
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
    if isinstance(method, Lora) and method.needs_statistics:
        assert batches is not None, "a start that looks at data needs batches"
        seen = [batches(i) for i in range(a.calibration_batches)]
        found = calibrate(model, method, targets, seen, loss=_base_loss(model))
        method, targets, statistics = found.method, found.targets, found.statistics
        if a.init_lora_weights == "eva":
            names = [path.replace("/", ".") for path in targets]  # it may have left layers out
    if method:
        whole |= method.fully_trained(leaves, targets)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    frozen, adapters = init_adapters(model.params, method, targets, rng=key, fully_trained=whole, statistics=statistics)
    return Adapted(frozen, adapters, method, names if method else None)


def _base_loss(model: Model) -> Callable[[Params, Batch], jax.Array]:
    """The mean loss of the model without an adapter, as a function of its parameters."""
    objective = Objective(model, None, model.config.num_labels if model.task == "classification" else 0)

    def loss(params: Params, batch: Batch) -> jax.Array:
        total, weight = objective.loss(objective.logits(params, {"sites": {}, "modules": {}}, {}, batch), batch)
        return total / jnp.maximum(weight, 1.0)

    return loss


def _target_names(config: RunConfig, method: Method | None, model: Model) -> str | list[str]:
    if isinstance(method, SiteMethod) and method.word_embeddings_only:
        return [required(model.family, "word_embeddings", method.name)]
    return config.adapter.target_modules or list(default_targets(method.name, model.model_type) if method else ())


def _completed(method: Method | None, config: RunConfig, model: Model, tokenizer: Any) -> Method | None:
    """`method` with what only the model and its tokenizer can say."""
    if isinstance(method, Ia3) and config.adapter.feedforward_modules is None:
        return replace(method, feedforward_modules=default_feedforward(model.model_type))
    if isinstance(method, PromptTuning) and method.prompt_tuning_init_text:
        assert tokenizer is not None, "a prompt that starts from a text needs the tokenizer"
        name = config.model.tokenizer or model.source.hub_id or str(model.source.directory)
        ids = tokenizer(method.prompt_tuning_init_text)["input_ids"]
        return replace(method, init_token_ids=tuple(ids), tokenizer_name_or_path=name)
    return method


def lora_plus(config: RunConfig, model: Model) -> LoraPlus | None:
    """LoRA+'s factors on the learning rate, or None without them."""
    t = config.training
    if not t.loraplus_lr_ratio:
        return None
    embeddings = frozenset(path for path, site in model.sites().items() if site.kind == "embedding")
    return LoraPlus(t.loraplus_lr_ratio, t.loraplus_lr_embedding / t.learning_rate, embeddings)


def prepare_optimizer(
    config: RunConfig, model: Model, learning_rate: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The run's optimizer, at the learning rates of a schedule, its plan's."""
    t = config.training
    return build_optimizer(
        learning_rate,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        accumulation_steps=t.accumulation_steps,
        lora_plus=lora_plus(config, model),
    )


def prepare_state(
    config: RunConfig, plan: Plan, optimizer: optax.GradientTransformation, adapters: Adapters, parallel: DataParallel
) -> TrainState:
    """The state before the first update, not yet placed: with masks or importance where `plan` prunes or allocates, and the key of
    the generator that suits the devices of `parallel`.
    """
    rng = dropout_key(config.seed, platform=parallel.device.platform, num_devices=parallel.mesh.size)
    allocated = plan.allocation is not None
    return init_state(adapters, optimizer, rng, pruned=plan.pruning is not None and not allocated, allocated=allocated)


def metric_names(config: RunConfig, num_labels: int | None) -> tuple[str, ...]:
    """The metrics of a task, the deciding one first: GLUE's own where it is one of its tasks."""
    if config.task == "masked-lm":
        return ("loss", "perplexity", "accuracy")
    task = GLUE.get((config.data.name or "").removeprefix("glue/"))
    if num_labels == 1:
        return ("pearson", "spearman")
    # Accuracy and F1 always, so that any two runs can be compared.
    return tuple(dict.fromkeys([*(task.metrics if task else ()), "accuracy", "f1"]))
