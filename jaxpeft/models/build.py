"""Builds and loads Flax models of transformers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.adapters.base import Site
from jaxpeft.errors import InputError, check_choice
from jaxpeft.families import family_of, required
from jaxpeft.families.base import Family
from jaxpeft.inject import discover_sites, recorded_calls
from jaxpeft.models.heads import HEADS, Head, check_request
from jaxpeft.models.inputs import module_inputs
from jaxpeft.models.quantized_files import check_method
from jaxpeft.models.sources import Source, resolve
from jaxpeft.models.weights import Checkpoint, open_checkpoint, without_other_classes
from jaxpeft.quantization import Quantization, QuantizedTensor, dequantize, is_quantized, quantize
from jaxpeft.trees import Params, below, leaf_paths, nest, under

Weights = Literal["pretrained", "random"]
"""Where a model's weights come from: its checkpoint, or random draws."""

Leaf = TypeVar("Leaf", np.ndarray, QuantizedTensor, np.ndarray | QuantizedTensor)


@dataclass(frozen=True)
class Model:
    """A Flax module of transformers, its parameters, and what training needs to know of it.

    `missing` lists the leaf paths that the checkpoint lacks. They were initialised at random. If the checkpoint's classifier is
    for another number of classes, `other_classes` is that number, and the leaves that depend on it are missing.
    """

    module: nn.Module
    config: Any
    params: Params
    task: str
    source: Source
    missing: tuple[str, ...] = ()
    other_classes: int | None = None
    found_sites: dict[str, Site] | None = None

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture, such as `bert`."""
        return self.config.model_type

    @property
    def head(self) -> Head:
        """The head that the model was loaded with."""
        return HEADS[self.task]

    @property
    def family(self) -> Family:
        """What jaxpeft knows of the architecture."""
        return family_of(self.model_type)

    @property
    def base_prefix(self) -> str:
        """Path of the encoder below the heads, such as `bert`; "" if the model is the encoder alone."""
        return _base_prefix(self.config, self.task)

    @property
    def torch_class(self) -> str:
        """Name of transformers' torch class for the same model."""
        return _flax_class(self.config, self.task).__name__.removeprefix("Flax")

    @property
    def quantization(self) -> Quantization | None:
        """Storage of the quantised kernels, by whomever they were quantised; None if there are none."""
        return next((Quantization.of(leaf) for leaf in leaf_paths(self.params).values() if is_quantized(leaf)), None)

    @property
    def behind_attention(self) -> str | None:
        """Path of the first module after the last attention; None if the family does not say.

        Tokens no longer interact there, so unused ones can be dropped from its input.
        """
        path = self.family.after_attention
        last = self.config.num_hidden_layers - 1
        return below(self.base_prefix, path.format(last=last)) if path else None

    def inputs(self, batch: dict[str, Any], *, virtual_tokens: int = 0) -> dict[str, Any]:
        """Return the module's arguments for a batch: `input_ids`, `attention_mask`, maybe `token_type_ids`, each `[batch, seq]`.

        `virtual_tokens` makes room before every row, as prompt tuning needs: `[batch, virtual + seq]`.
        """
        return module_inputs(self.module, self.config, batch, virtual_tokens)

    def tied_embeddings(self, layers: Iterable[str]) -> str | None:
        """Return the path among `layers` whose embeddings are also the decoder of masked language modelling, or None.

        Raises:
            InputError: if there are embeddings among them and the family does not say which ones are the words'.
        """
        if not self.head.ties_words or not self.config.tie_word_embeddings:
            return None
        sites = self.sites()
        embeddings = [path for path in layers if path in sites and sites[path].kind == "embedding"]
        words = required(self.family, "word_embeddings", "embeddings with an adapter") if embeddings else None
        return next((path for path in embeddings if path.rpartition("/")[2] == words), None)

    def sites(self) -> dict[str, Site]:
        """Return all linear layers and embeddings by path. `load_model` has traced them already (`discover_sites`)."""
        return self.found_sites or discover_sites(self.module, self.params, **_example(self.module, self.config))


@dataclass(frozen=True)
class AbstractModel:
    """A model without its weights.

    Attributes:
        model: transformers' Flax model, not initialised.
        shapes: leaf path → `jax.ShapeDtypeStruct`.
        sites: the linear layers and embeddings by path, as from `discover_sites`.
        kernels: leaf paths of the linear layers' kernels.
        base_prefix: path of the encoder below the heads, such as `bert`; "" if the model is the encoder alone.
    """

    model: Any
    shapes: dict[str, Any]
    sites: dict[str, Site]
    kernels: frozenset[str]
    base_prefix: str

    @property
    def base_kernels(self) -> set[str]:
        """Leaf paths of the kernels of the encoder's linear layers. Quantisation is for these only."""
        return {path for path in self.kernels if under(path, [self.base_prefix])}


def build_abstract_model(
    config: Any, task: str, *, dtype: str = "float32", gradient_checkpointing: bool = False
) -> AbstractModel:
    """Build the Flax model of transformers' `config` for `task`, without computing anything.

    Raises:
        InputError: for an unknown task, and for an architecture without a Flax class, without gradient checkpointing if that
            is asked for, or with more inputs than an encoder has.
    """
    flax_class = _flax_class(config, task)
    with (
        recorded_calls() as calls
    ):  # transformers traces the model for its shapes; another trace would take as long again
        model = _uninitialised(flax_class, config, jnp.dtype(dtype), HEADS[task].module_options, gradient_checkpointing)
    _example(model.module, config)  # refuses a decoder
    shapes = leaf_paths(model.params_shape_tree)
    sites = calls.sites(shapes)
    kernels = frozenset(f"{layer}/kernel" for layer in sites) & shapes.keys()
    return AbstractModel(model, shapes, sites, kernels, _base_prefix(config, task))


@dataclass(frozen=True)
class CheckpointHandle:
    """A model whose weights have not been read yet. `load_model` reads them, `models.shapes` needs only their shapes.

    `trained` are the leaf paths of the fully trained parameters, `missing` those of them that the checkpoint lacks, and
    `other_classes` is as in `Model`.
    """

    config: Any
    task: str
    source: Source
    abstract: AbstractModel
    reader: Checkpoint
    trained: set[str]
    missing: tuple[str, ...]
    other_classes: int | None = None

    def model(self, params: Params) -> Model:
        """Return the model with `params`."""
        s = self.abstract
        return Model(
            s.model.module, self.config, params, self.task, self.source, self.missing, self.other_classes, s.sites
        )


def open_model(
    name: str,
    task: str,
    *,
    weights: Weights,
    num_labels: int | None,
    dtype: str,
    dropout: float | None,
    gradient_checkpointing: bool,
    trained_leaves: Callable[[Sequence[str], str], set[str]],
) -> CheckpointHandle:
    """Find a model's files and build everything that needs no weight. Arguments and errors are those of `load_model`."""
    check_choice("weights", weights, get_args(Weights))
    check_request(task, num_labels=num_labels, dtype=dtype, dropout=dropout)
    source = resolve(name)
    num_labels = num_labels or HEADS[task].num_outputs
    config = read_config(source, num_labels)
    abstract = build_abstract_model(
        _with_dropout(config, dropout), task, dtype=dtype, gradient_checkpointing=gradient_checkpointing
    )
    paths, pretrained = list(abstract.shapes), weights == "pretrained"
    reader = open_checkpoint(source.directory, paths, encoder_name(config, task)) if pretrained else Checkpoint({})
    reader, other_classes = without_other_classes(reader, abstract.shapes, abstract.base_prefix, num_labels)
    missing = tuple(path for path in paths if path not in reader) if pretrained else ()
    trained = trained_leaves(paths, abstract.base_prefix) | set(missing)
    return CheckpointHandle(config, task, source, abstract, reader, trained, missing, other_classes)


def load_model(
    name: str,
    task: str,
    *,
    weights: Weights = "pretrained",
    num_labels: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    dropout: float | None = None,
    gradient_checkpointing: bool = False,
    quantization: Quantization | None = None,
    trained_leaves: Callable[[Sequence[str], str], set[str]] = lambda leaves, base_prefix: set(),
    seed: int = 0,
) -> Model:
    """Load a Flax BERT, DistilBERT, RoBERTa, … for `task`.

    Leaves are read one at a time, so a quantised base is never held whole in full precision. Kernels that the checkpoint holds
    quantised (by `python -m jaxpeft quantize` or by bitsandbytes) stay as they are.

    Args:
        name: hub id, directory, `package:module/folder`, or a `config.json`.
        task: "masked-lm", "classification" (of sequences), "token-classification", "question-answering", or "sentence-embeddings" (the
            encoder alone, without a pooler).
        weights: "random" initialises every weight and needs only a config.
        num_labels: number of classes, or 1 for regression; for classification only. If the checkpoint's classifier has another
            number, it is replaced by a new one.
        dtype: what the layers compute in, and what frozen matrices are stored in. Vectors and trained leaves stay fp32.
        dropout: rate of every dropout in the base while training, 0 to 1; None keeps the checkpoint's own.
        gradient_checkpointing: recompute each layer in the backward pass: less memory, about a third more time.
        quantization: store the base's linear kernels in NF4, FP4 or int8. A base with random weights is held whole in full
            precision first.
        trained_leaves: `(leaf paths, base prefix)` → the leaf paths that will train. They stay fp32 arrays, and so do leaves that
            the checkpoint lacks.
        seed: for the leaves that the checkpoint lacks.

    Raises:
        InputError: for an unknown model or task, an architecture without a Flax class, missing or unreadable weights, a
            `dropout` for an architecture whose rates are not known, and a `quantization` other than the checkpoint's.
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


def read_config(source: Source, num_labels: int | None = None) -> Any:
    """Return transformers' config of `source`, without `quantization_config`, which describes only the files.

    Raises:
        InputError: for an architecture that transformers does not know, and for files that bitsandbytes did not quantise.
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
    """Return a copy of `config` with every dropout rate set. The original is saved with the model, so it keeps its own rates."""
    if rate is None:
        return config
    copy = type(config).from_dict(config.to_dict())
    for name in required(family_of(config.model_type), "dropout_rates", f"model.dropout {rate:g}"):
        if hasattr(copy, name):
            setattr(copy, name, rate)
    return copy


def _flax_class(config: Any, task: str) -> Any:
    found = HEADS[task].flax_class(type(config))
    if found is None:
        known = ", ".join(HEADS[task].model_types)
        raise InputError(f"transformers has no Flax model of type '{config.model_type}' for {task}; it has {known}")
    return found


def encoder_name(config: Any, task: str) -> str:
    """Return the name of the encoder in a model with a head, such as `bert`."""
    return family_of(config.model_type).base_prefix or _flax_class(config, task).base_model_prefix


def _base_prefix(config: Any, task: str) -> str:
    return "" if HEADS[task].is_bare else encoder_name(config, task)


def _uninitialised(
    flax_class: Any, config: Any, dtype: Any, module_options: Mapping[str, Any], gradient_checkpointing: bool
) -> Any:
    # Not all architectures have such a part, and those that lack it do not have the option.
    options = {name: value for name, value in module_options.items() if hasattr(flax_class.module_class, name)}
    if gradient_checkpointing:
        if "gradient_checkpointing" not in inspect.signature(flax_class.__init__).parameters:
            raise InputError(f"gradient checkpointing: transformers' {flax_class.__name__} does not have it")
        options["gradient_checkpointing"] = True
    # transformers 4 warns for every model that version 5 has no Flax. We pin version 4, so no user can act on the warning.
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
    """Return initial values of the leaves `paths`. XLA drops the computation of the others."""
    if not paths:
        return {}

    @jax.jit
    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = leaf_paths(model.init_weights(key, (1, 1)))
        return {path: leaves[path] for path in paths}

    return jax.device_get(init(jax.random.key(seed)))


def checked(leaf: Leaf, path: str, shape: tuple[int, ...], source: Source) -> Leaf:
    """Return `leaf` if it has `shape`.

    Raises:
        InputError: if the checkpoint's leaf has another shape than the config says.
    """
    if leaf.shape != shape:
        raise InputError(f"{source.description}: {path} has shape {leaf.shape}, and the config asks for {shape}")
    return leaf


def _check_stored(
    tensor: QuantizedTensor, path: str, abstract: AbstractModel, asked: Quantization | None, source: Source
) -> None:
    held = Quantization.of(tensor)
    if path not in abstract.kernels:
        raise InputError(
            f"{source.description}: {path} is stored in {held.data_type}, which is possible only for linear layers"
        )
    if asked and str(asked) != str(held):
        raise InputError(
            f"{source.description} holds {path} in {held}, and {asked} was asked for: keep its own "
            "(--model.quantization none), or quantise the full-precision model"
        )
