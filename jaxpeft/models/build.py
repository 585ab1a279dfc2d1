"""Building and loading Flax models of transformers: the only file that imports its Flax classes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.adapters.base import Site
from jaxpeft.errors import InputError
from jaxpeft.inject import discover_sites
from jaxpeft.models.inputs import module_inputs
from jaxpeft.models.quantized_files import check_method
from jaxpeft.models.sources import Source, resolve
from jaxpeft.models.weights import Checkpoint, open_checkpoint
from jaxpeft.quantization import Quantization, QuantizedTensor, dequantize, is_quantized, quantize
from jaxpeft.trees import Params, leaf_paths, nest

Task = Literal["masked-lm", "classification"]
TASKS: tuple[Task, ...] = ("masked-lm", "classification")

Leaf = TypeVar("Leaf", np.ndarray, QuantizedTensor, np.ndarray | QuantizedTensor)

# The module that takes in what the last layer's attention gives, by architecture: from there on no token sees another, so
# the rest of the layer and the head need only the tokens that are asked for.
_BEHIND_ATTENTION = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "roberta-prelayernorm", "electra"), "encoder/layer/{last}/attention/output"
    ),
    "distilbert": "transformer/layer/{last}/sa_layer_norm",
}

# What transformers' configs call their dropout rates: BERT and its kin, DistilBERT, the classifiers.
_DROPOUT_RATES = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
    *("dropout", "attention_dropout"),
    *("classifier_dropout", "seq_classif_dropout"),
)


@dataclass(frozen=True)
class Model:
    """A Flax module of transformers with its parameters and what one must know to train it.

    `missing` lists the leaf paths that the checkpoint lacks and that were drawn at random.
    """

    module: nn.Module
    config: Any
    params: Params
    task: Task
    source: Source
    missing: tuple[str, ...] = ()
    found_sites: dict[str, Site] | None = None

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture, such as `bert`."""
        return self.config.model_type

    @property
    def base_prefix(self) -> str:
        """The path of the encoder below the heads, such as `bert`."""
        return _base_prefix(_flax_class(self.config, self.task))

    @property
    def torch_class(self) -> str:
        """The name of transformers' torch class of the same model."""
        return _flax_class(self.config, self.task).__name__.removeprefix("Flax")

    @property
    def quantization(self) -> Quantization | None:
        """How its quantised kernels are stored, whoever quantised them; None where there are none."""
        return next((Quantization.of(leaf) for leaf in leaf_paths(self.params).values() if is_quantized(leaf)), None)

    @property
    def behind_attention(self) -> str | None:
        """Path of the module behind the last layer's attention, where it is known: what is left out of its input, nothing misses."""
        path = _BEHIND_ATTENTION.get(self.model_type)
        last = self.config.num_hidden_layers - 1
        return f"{self.base_prefix}/{path.format(last=last)}" if path else None

    def inputs(self, batch: dict[str, Any], *, virtual_tokens: int = 0) -> dict[str, Any]:
        """The module's arguments for a batch with `input_ids`, `attention_mask` and maybe `token_type_ids`, each `[batch, seq]`.

        With `virtual_tokens` there is room for so many in front of every row, as prompt tuning asks for: `[batch, virtual + seq]`.
        """
        return module_inputs(self.module, self.config, batch, virtual_tokens)

    def sites(self) -> dict[str, Site]:
        """All linear layers by path (`discover_sites` on one short row), traced once for a model that was loaded."""
        return self.found_sites or discover_sites(self.module, self.params, **_example(self.module, self.config))


@dataclass(frozen=True)
class AbstractModel:
    """A model without its weights: transformers' Flax model, not initialised, and what leaves it has.

    `shapes` is leaf path → `jax.ShapeDtypeStruct`, `sites` what `discover_sites` finds, `kernels` the leaf paths of the linear
    layers' kernels, and `base_prefix` the path of the encoder below the heads, such as `bert`.
    """

    model: Any
    shapes: dict[str, Any]
    sites: dict[str, Site]
    kernels: frozenset[str]
    base_prefix: str

    @property
    def base_kernels(self) -> set[str]:
        """The kernels of the encoder's linear layers: those that are quantised."""
        return {path for path in self.kernels if path.startswith(self.base_prefix + "/")}


def build_abstract_model(
    config: Any, task: Task, *, dtype: str = "float32", gradient_checkpointing: bool = False
) -> AbstractModel:
    """Build the Flax model of transformers' `config` for `task`, computing nothing.

    Raises:
        InputError: for an architecture without a Flax class, or one that cannot checkpoint gradients.
    """
    flax_class = _flax_class(config, task)
    model = _bare(flax_class, config, jnp.dtype(dtype), gradient_checkpointing)
    shapes = leaf_paths(model.params_shape_tree)
    sites = discover_sites(model.module, nest(shapes), **_example(model.module, config))
    kernels = frozenset(f"{layer}/kernel" for layer in sites) & shapes.keys()
    return AbstractModel(model, shapes, sites, kernels, _base_prefix(flax_class))


@dataclass(frozen=True)
class CheckpointHandle:
    """A model whose weights are yet to be read: what `load_model` reads from, and `models.shapes` takes shapes from.

    `trained` are the leaf paths that train whole, `missing` those of them that the checkpoint lacks.
    """

    config: Any
    task: Task
    source: Source
    abstract: AbstractModel
    reader: Checkpoint
    trained: set[str]
    missing: tuple[str, ...]

    def model(self, params: Params) -> Model:
        """The model with `params`."""
        s = self.abstract
        return Model(s.model.module, self.config, params, self.task, self.source, self.missing, s.sites)


def open_model(
    name: str,
    task: Task,
    *,
    weights: Literal["pretrained", "random"],
    num_labels: int | None,
    dtype: str,
    dropout: float | None,
    gradient_checkpointing: bool,
    trained_leaves: Callable[[Sequence[str], str], set[str]],
) -> CheckpointHandle:
    """Find a model's files and build what needs no weight; arguments and errors are `load_model`'s."""
    source = resolve(name)
    config = read_config(source, num_labels)
    abstract = build_abstract_model(
        _with_dropout(config, dropout), task, dtype=dtype, gradient_checkpointing=gradient_checkpointing
    )
    paths, pretrained = list(abstract.shapes), weights == "pretrained"
    reader = open_checkpoint(source.directory, paths, abstract.base_prefix) if pretrained else Checkpoint({})
    missing = tuple(path for path in paths if path not in reader) if pretrained else ()
    trained = trained_leaves(paths, abstract.base_prefix) | set(missing)
    return CheckpointHandle(config, task, source, abstract, reader, trained, missing)


def load_model(
    name: str,
    task: Task,
    *,
    weights: Literal["pretrained", "random"] = "pretrained",
    num_labels: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    quantization: Quantization | None = None,
    trained_leaves: Callable[[Sequence[str], str], set[str]] = lambda leaves, base_prefix: set(),
    seed: int = 0,
) -> Model:
    """Load a Flax BERT, DistilBERT, RoBERTa, … for `task`; leaves come one at a time, so a quantised base never stands in full.

    Kernels that the checkpoint holds quantised (`python -m jaxpeft quantize`, or bitsandbytes' own) stay as they are.

    Args:
        name: hub id, directory, `package:module/folder`, or a `config.json`.
        task: masked language modelling or sequence classification.
        weights: "random" needs no more than a config.
        num_labels: classes, or 1 for regression; for classification.
        dtype: what the layers compute in, and what frozen matrices are stored in (vectors and all that trains stay fp32).
        dropout: rate of every dropout in the base while training; None keeps the checkpoint's own.
        gradient_checkpointing: recompute each layer in the backward pass: less memory, about a third more time.
        quantization: store the base's linear kernels in NF4, FP4 or int8. A drawn base (weights "random") stands in full first.
        trained_leaves: (leaf paths, the base model's prefix) → those that will train; they stay fp32 arrays, as does what
            the checkpoint lacks.
        seed: draws what the checkpoint lacks.

    Raises:
        InputError: for an unknown model, an architecture without a Flax class, missing or unreadable weights, and where
            `quantization` is not what the checkpoint holds.
    """
    opened = open_model(
        name,
        task,
        weights=weights,
        num_labels=num_labels,
        dtype=dtype,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        trained_leaves=trained_leaves,
    )
    source, abstract, reader, trained = opened.source, opened.abstract, opened.reader, opened.trained
    shapes = abstract.shapes
    values = _draw(abstract.model, [path for path in shapes if path not in reader], seed)
    leaves: dict[str, Any] = {}
    for path, shape in shapes.items():
        leaf = values[path] if path in values else checked(reader.read(path), path, shape.shape, source)
        if is_quantized(leaf):
            _check_stored(leaf, path, abstract, quantization, source)
            leaves[path] = dequantize(leaf) if path in trained else jax.device_put(leaf)
        elif path in trained:
            leaves[path] = jnp.asarray(leaf)
        elif quantization and path in abstract.base_kernels:
            leaves[path] = jax.device_put(quantize(leaf, **vars(quantization)))
        else:
            leaves[path] = jnp.asarray(leaf, jnp.dtype(dtype) if leaf.ndim > 1 else jnp.float32)
    return opened.model(nest(leaves))


def load_tokenizer(directory: Path | str) -> Any:
    """The fast tokenizer of the files in `directory`.

    Raises:
        InputError: where there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"no tokenizer in {directory}; name one with --model.tokenizer") from error


def read_config(source: Source, num_labels: int | None = None) -> Any:
    """Transformers' config of `source`, without the `quantization_config` that is true of its files only.

    Raises:
        InputError: for an architecture that transformers does not know, and for files quantised by another than bitsandbytes.
    """
    from transformers import AutoConfig

    extra = {} if num_labels is None else {"num_labels": num_labels}
    file = Path(source.name) if source.name.endswith(".json") else source.directory
    try:
        config = AutoConfig.from_pretrained(str(file), **extra)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model '{source.name}': its config.json names no architecture that transformers knows"
        ) from error
    if hasattr(config, "quantization_config"):
        check_method(config.quantization_config, f"model '{source.name}'")
        del config.quantization_config
    return config


def _with_dropout(config: Any, rate: float | None) -> Any:
    """A copy of `config` with every dropout rate set, so that what is saved keeps the checkpoint's own."""
    if rate is None:
        return config
    copy = type(config).from_dict(config.to_dict())
    for name in _DROPOUT_RATES:
        if hasattr(copy, name):
            setattr(copy, name, rate)
    return copy


def _flax_class(config: Any, task: Task) -> Any:
    from transformers import FLAX_MODEL_FOR_MASKED_LM_MAPPING, FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    mapping = (
        FLAX_MODEL_FOR_MASKED_LM_MAPPING if task == "masked-lm" else FLAX_MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    if type(config) not in mapping:
        known = ", ".join(sorted(key.model_type for key in mapping))
        raise InputError(f"transformers has no Flax model of type '{config.model_type}' for {task}; it has {known}")
    return mapping[type(config)]


def _base_prefix(flax_class: Any) -> str:
    # XLM-RoBERTa's class says "xlm-roberta", and its encoder is RoBERTa's (transformers 4.57).
    return {"xlm-roberta": "roberta"}.get(flax_class.base_model_prefix, flax_class.base_model_prefix)


def _bare(flax_class: Any, config: Any, dtype: Any, gradient_checkpointing: bool) -> Any:
    options = {}
    if gradient_checkpointing:
        if "gradient_checkpointing" not in inspect.signature(flax_class.__init__).parameters:
            raise InputError(f"gradient checkpointing: transformers' {flax_class.__name__} does not have it")
        options = {"gradient_checkpointing": True}
    # transformers 4 says at every model that version 5 has no Flax; our pin is the answer, and no user can act on it.
    logger = logging.getLogger("transformers.modeling_flax_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return flax_class(config, dtype=dtype, _do_init=False, **options)
    finally:
        logger.setLevel(level)


def _example(module: nn.Module, config: Any) -> dict[str, Any]:
    ids = jnp.ones((1, 8), jnp.int32)
    return module_inputs(module, config, {"input_ids": ids, "attention_mask": ids})


def _draw(model: Any, paths: list[str], seed: int) -> dict[str, np.ndarray]:
    """Initial values of the leaves `paths`, and of no others: XLA drops what is not asked for."""
    if not paths:
        return {}

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = leaf_paths(model.init_weights(key, (1, 1)))
        return {path: leaves[path] for path in paths}

    return jax.device_get(init(jax.random.key(seed)))


def checked(leaf: Leaf, path: str, shape: tuple[int, ...], source: Source) -> Leaf:
    """`leaf`, if it has `shape`.

    Raises:
        InputError: where the checkpoint's leaf is of another shape than the config's.
    """
    if leaf.shape != shape:
        raise InputError(f"{source.description}: {path} has shape {leaf.shape} where the config asks for {shape}")
    return leaf


def _check_stored(
    tensor: QuantizedTensor, path: str, abstract: AbstractModel, asked: Quantization | None, source: Source
) -> None:
    held = Quantization.of(tensor)
    if path not in abstract.kernels:
        raise InputError(f"{source.description}: {path} is stored in {held.data_type}, and only linear layers may be")
    if asked and str(asked) != str(held):
        raise InputError(
            f"{source.description} holds {path} in {held}, and {asked} was asked for: take it as it is "
            "(--model.quantization none), or quantise the full-precision model"
        )
