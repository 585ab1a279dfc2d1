"""Loads a model as shapes and dtypes, without its weights."""

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
    """Return the model that `load_model` loads, with a `jax.ShapeDtypeStruct` for each array. Computes nothing.

    Only the names in a checkpoint are read. If it is stored quantised, the encoder's kernels are also read, one at a time, to find
    out how each is stored.

    Args:
        name: as in `load_model`.
        task: as in `load_model`.
        quantization: as in `load_model`.
        **options: all other arguments of `load_model` except `seed`.

    Raises:
        InputError: as `load_model`, except for leaves with another shape than the config says: these are not noticed.
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
    """Return how the checkpoint stores the kernel at `path`; None if it is not quantised."""
    if path not in opened.abstract.kernels or path not in opened.reader or not _says_quantized(opened.source.directory):
        return None
    leaf = opened.reader.read(path)
    return Quantization.of(leaf) if is_quantized(leaf) else None


def _says_quantized(directory: Path) -> bool:
    return "quantization_config" in json.loads((directory / "config.json").read_text())
