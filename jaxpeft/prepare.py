"""From a configuration to the parts of a run: data, model, adapters. Shared by training and by the commands on finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax

from jaxpeft.adapters import METHODS, Method
from jaxpeft.adapters.init import init_adapters
from jaxpeft.config import RunConfig
from jaxpeft.data import (
    GLUE,
    ClassificationData,
    MaskedLMData,
    Split,
    Splits,
    classification_data,
    load_splits,
    masked_lm_data,
)
from jaxpeft.errors import InputError
from jaxpeft.models.build import Model, Quantization, load_model, load_tokenizer, max_tokens
from jaxpeft.models.sources import resolve
from jaxpeft.paths import Adapters, Params, leaf_paths
from jaxpeft.targets import CLASSIFIER_HEADS, DEFAULT_TARGETS, match_targets, whole_modules

Data = MaskedLMData | ClassificationData


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
    model = load_model(
        m.name,
        config.task,
        weights=m.weights,
        num_labels=num_labels,
        dtype=m.dtype,
        dropout=m.dropout,
        gradient_checkpointing=m.gradient_checkpointing,
        quantization=Quantization(m.quantization_block_size, m.double_quantization)
        if m.quantization == "nf4"
        else None,
        trained_leaves=lambda leaves, base_prefix: whole_leaves(config, leaves, base_prefix),
        seed=config.seed,
    )
    limit = max_tokens(model.config)
    if config.data.max_length > limit:
        raise InputError(
            f"data.max_length {config.data.max_length} exceeds the {limit} positions of {m.name}; give at most {limit}"
        )
    tokenizer = load_tokenizer(resolve(m.tokenizer).directory if m.tokenizer else model.source.directory)
    if len(tokenizer) > model.config.vocab_size:
        # An index behind the table's end would be clamped in silence.
        raise InputError(
            f"the tokenizer {m.tokenizer or m.name} has {len(tokenizer)} tokens and the model embeddings for "
            f"{model.config.vocab_size}; name the model's own with model.tokenizer"
        )
    return model, tokenizer


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


def whole_leaves(config: RunConfig, leaves: Sequence[str], base_prefix: str) -> set[str]:
    """The leaf paths that train whole: modules_to_save, a classifier's head (as in PEFT), the baselines' share."""
    if config.adapter.method == "full":
        return set(leaves)
    chosen = whole_modules(leaves, config.adapter.modules_to_save or [])
    outside = {leaf for leaf in leaves if not leaf.startswith(base_prefix + "/")}
    if config.task == "classification":
        heads = [head for head in CLASSIFIER_HEADS if any(head in leaf for leaf in outside)]
        return chosen | whole_modules(outside, heads)
    return chosen | outside if config.adapter.method == "head" else chosen


def build_method(config: RunConfig) -> Method | None:
    """The adapter method that `config.adapter` names; None for the baselines."""
    a = config.adapter
    if a.method not in METHODS:
        return None
    # A method's fields have the names of the flags that set them.
    method: Any = METHODS[a.method]
    return method(**{field.name: getattr(a, field.name) for field in fields(method)})


@dataclass(frozen=True)
class Adapted:
    """A base with fresh adapters, and the names that its exported config will say."""

    frozen: Params
    adapters: Adapters
    method: Method | None
    target_modules: str | list[str] | None


def prepare_adapters(config: RunConfig, model: Model) -> Adapted:
    """Choose the layers, and draw their adapters from the run's seed.

    Raises:
        InputError: where a name matches nothing, or the rank exceeds a layer's width.
    """
    a, method = config.adapter, build_method(config)
    whole = whole_leaves(config, list(leaf_paths(model.params)), model.base_prefix) | set(model.missing)
    names = a.target_modules or list(DEFAULT_TARGETS.get(model.model_type, ()))
    if method and not names:
        raise InputError(
            f"there are no default target modules for '{model.model_type}'; name some with adapter.target_modules"
        )
    layers = {leaf.rpartition("/")[0] for leaf in whole}
    targets = (
        match_targets(model.sites(), names, exclude_modules=a.exclude_modules, whole_layers=layers) if method else {}
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    frozen, adapters = init_adapters(model.params, method, targets, rng=key, whole_leaves=whole)
    return Adapted(frozen, adapters, method, names if method else None)


def metric_names(config: RunConfig, num_labels: int | None) -> tuple[str, ...]:
    """The metrics of a task, the deciding one first: GLUE's own where it is one of its tasks."""
    if config.task == "masked-lm":
        return ("loss", "perplexity", "accuracy")
    task = GLUE.get((config.data.name or "").removeprefix("glue/"))
    if num_labels == 1:
        return ("pearson", "spearman")
    # Accuracy and F1 always, so that any two runs can be compared.
    return tuple(dict.fromkeys([*(task.metrics if task else ()), "accuracy", "f1"]))
