"""Contextual sparsity in a run: from its flags to the settings of a step, and the estimators beside the base."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxpeft.config.contextual import ContextualConfig
from jaxpeft.contextual import ContextualSparsity
from jaxpeft.contextual.estimators import estimator_shapes, make_estimators
from jaxpeft.contextual.settings import per_layer
from jaxpeft.errors import InputError
from jaxpeft.families import required
from jaxpeft.models.build import Model
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.trees import Layers, by_leaf


def contextual_sparsity(flags: ContextualConfig, model: Model) -> ContextualSparsity | None:
    """The settings that the flags give for `model`; None if every channel is computed.

    Raises:
        InputError: a list has not one value per layer, or the model's family does not say what its projections are.
    """
    if not flags.is_on:
        return None
    required(model.family, "projections", "contextual sparsity")
    number = model.config.num_hidden_layers
    return ContextualSparsity(
        feed_forward=per_layer(flags.ffn_sparsity, number, "contextual.ffn_sparsity"),
        attention=per_layer(flags.qkv_sparsity, number, "contextual.qkv_sparsity"),
        selection=flags.selection,
        dense_tokens=flags.dense_tokens,
    )


def estimators_of(settings: ContextualSparsity | None, model: Model, *, rank: int, kept: Path | None = None) -> Layers:
    """The estimators that the run needs, {} if none: from the file `kept` if there is one, else computed.

    Raises:
        InputError: the file cannot be read, or its arrays do not fit the model.
    """
    if settings is None or settings.selection != "svd":
        return {}
    if kept is not None and kept.is_file():
        return _read(kept, model, settings, rank)
    return make_estimators(model, settings.sparse_layers, rank=rank)


def estimator_shapes_of(settings: ContextualSparsity | None, model: Model, *, rank: int) -> Layers:
    """The shapes of `estimators_of`, as `jax.ShapeDtypeStruct`."""
    if settings is None or settings.selection != "svd":
        return {}
    return estimator_shapes(model, settings.sparse_layers, rank=rank)


def save_estimators(estimators: Layers, directory: RunDirectory) -> None:
    """Keep `estimators` beside the run, so that a resumed run chooses with the very same numbers. Nothing is written if there are none."""
    from safetensors.numpy import save_file

    if estimators:
        arrays = {path: np.ascontiguousarray(leaf) for path, leaf in by_leaf(estimators).items()}
        save_file(arrays, directory.estimators)


def _read(file: Path, model: Model, settings: ContextualSparsity, rank: int) -> Layers:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read ({error}); remove it, and it is computed again") from error
    wanted = estimator_shapes(model, settings.sparse_layers, rank=rank)
    found: Layers = {}
    for path, group in wanted.items():
        for name, shape in group.items():
            array = arrays.get(f"{path}/{name}")
            if array is None or array.shape != shape.shape:
                raise InputError(
                    f"{file} has no {path}/{name} of shape {shape.shape}; remove it, and it is computed again"
                )
            found.setdefault(path, {})[name] = jnp.asarray(array)
    return found
