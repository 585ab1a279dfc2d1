"""Load the base that the model's flags name, or only its shapes."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters import Method, SiteMethod
from jaxpeft.config import AdapterConfig, ModelConfig
from jaxpeft.errors import InputError
from jaxpeft.models.build import Model, Quantization, load_model, read_config
from jaxpeft.models.heads import HEADS
from jaxpeft.models.inputs import max_tokens
from jaxpeft.models.label_maps import class_names
from jaxpeft.models.quantized_files import check_storable
from jaxpeft.models.shapes import model_shapes
from jaxpeft.models.sources import resolve
from jaxpeft.models.tokenizers import load_tokenizer
from jaxpeft.runs.adapters import fully_trained
from jaxpeft.tasks.base import Task


def load_base(
    model: ModelConfig, task: Task, method: Method | None, adapter: AdapterConfig, *, max_length: int, seed: int
) -> tuple[Model, Any]:
    """Load the base and its tokenizer.

    Args:
        model: its flags.
        task: decides the head.
        method: the adapter method. Its virtual tokens take up positions of the model.
        adapter: decides which parameters are fully trained and therefore stay in full precision.
        max_length: tokens per row.
        seed: initialises the parameters that the checkpoint lacks.

    Returns:
        the model and its tokenizer.

    Raises:
        InputError: as `load_model`; the model has too few positions for a row; or the tokenizer has more tokens than the model.
    """
    loaded = load_model(model.name, task.head, **_options(model, task, adapter), seed=seed)
    _check_length(model, loaded, method, max_length)
    tokenizer = tokenizer_of(model, loaded)
    if len(tokenizer) > loaded.config.vocab_size:
        # jax would silently clamp a token id beyond the table's end.
        raise InputError(
            f"the tokenizer {model.tokenizer or model.name} has {len(tokenizer)} tokens and the model embeddings for "
            f"{loaded.config.vocab_size}; name the model's own with model.tokenizer"
        )
    return loaded, tokenizer


def base_shapes(
    model: ModelConfig, task: Task, method: Method | None, adapter: AdapterConfig, *, max_length: int
) -> Model:
    """The base as `load_base` loads it, but with shapes instead of weights and without a tokenizer.

    Raises:
        InputError: as `load_base`, except for the tokenizer.
    """
    shapes = model_shapes(model.name, task.head, **_options(model, task, adapter))
    _check_length(model, shapes, method, max_length)
    return shapes


def label_names_of_base(model: ModelConfig) -> tuple[str, ...] | None:
    """The names of the base's classes in the order of their ids, by its config; None if it names none.

    Raises:
        InputError: as `load_model`, for the model's files.
    """
    return class_names(read_config(resolve(model.name)))


def tokenizer_of(model: ModelConfig, loaded: Model) -> Any:
    """The tokenizer that `model.tokenizer` names, or else the model's own."""
    return load_tokenizer(resolve(model.tokenizer).directory if model.tokenizer else loaded.source.directory)


def _options(model: ModelConfig, task: Task, adapter: AdapterConfig) -> dict[str, Any]:
    block_size, double = model.quantization_block_size, model.double_quantization
    scheme = Quantization(model.quantization, block_size, double) if model.quantization != "none" else None
    if scheme and model.weights == "random":
        check_storable(scheme)  # the run writes its random base to files at the end, because nobody else has it
    return {
        "weights": model.weights,
        "num_labels": task.num_labels if HEADS[task.head].has_classes else None,
        "dtype": model.dtype,
        "dropout": model.dropout,
        "gradient_checkpointing": model.gradient_checkpointing,
        "quantization": scheme,
        "trained_leaves": lambda leaves, base_prefix: fully_trained(adapter, task, leaves, base_prefix),
    }


def _check_length(model: ModelConfig, loaded: Model, method: Method | None, max_length: int) -> None:
    virtual = method.virtual_tokens if isinstance(method, SiteMethod) else 0
    limit = max_tokens(loaded.config) - virtual
    if max_length > limit:
        besides = f" besides adapter.num_virtual_tokens {virtual}" if virtual else ""
        raise InputError(
            f"data.max_length {max_length} exceeds the {limit} positions of {model.name}{besides}; give at most {limit}"
        )
