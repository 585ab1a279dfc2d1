"""A model without its weights: what `load_model` gives, with the shape and dtype of every leaf instead of its values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.models.build import CheckpointHandle, Model, open_model
from jaxpeft.quantization import Quantization, is_quantized, quantized_shape
from jaxpeft.trees import nest


def model_shapes(name: str, task: Any, *, quantization: Quantization | None = None, **options: Any) -> Model:
    """`load_model` of the same arguments with a `jax.ShapeDtypeStruct` for each array; computes nothing and holds no weight.

    Of a pretrained checkpoint the names are read. Of one that is stored quantised the encoder's kernels are, one at a time,
    to see how.

    Args:
        name: as in `load_model`.
        task: as in `load_model`.
        quantization: as in `load_model`.
        **options: the other arguments of `load_model`, all of them but `seed`.

    Raises:
        InputError: as `load_model`, but for leaves that are not as the config says.
    """
    opened = open_model(name, task, **options)
    matrix_dtype = jnp.dtype(options["dtype"])
    leaves: dict[str, Any] = {}
    for path, leaf in opened.abstract.shapes.items():
        scheme = _stored(opened, path) or (quantization if path in opened.abstract.base_kernels else None)
        if scheme and path not in opened.trained:
            leaves[path] = quantized_shape(leaf.shape, scheme)
        else:
            narrow = leaf.ndim > 1 and path not in opened.trained
            leaves[path] = jax.ShapeDtypeStruct(leaf.shape, matrix_dtype if narrow else jnp.float32)
    return opened.model(nest(leaves))


def _stored(opened: CheckpointHandle, path: str) -> Quantization | None:
    """How the checkpoint holds the kernel at `path`, where it holds it quantised."""
    if path not in opened.abstract.kernels or path not in opened.reader or not _says_quantized(opened.source.directory):
        return None
    leaf = opened.reader.read(path)
    return Quantization.of(leaf) if is_quantized(leaf) else None


def _says_quantized(directory: Path) -> bool:
    return "quantization_config" in json.loads((directory / "config.json").read_text())
