"""Write a merged model as transformers does. It loads in torch (`from_pretrained`), and as a base here and in Flax."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.models.build import Model
from jaxpeft.models.label_maps import label_maps
from jaxpeft.models.quantized_files import quantization_config, stored_tensors
from jaxpeft.models.weights import to_torch_layout, torch_name
from jaxpeft.quantization import Quantization, is_quantized
from jaxpeft.trees import Params, leaf_paths, under


def new_directory(output: Path | str) -> Path:
    """`output` as a path, if nothing would be overwritten there.

    Raises:
        InputError: if it is a file, or a directory that is not empty.
    """
    path = Path(output)
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        raise InputError(f"'{output}' exists and is not empty; give a new directory")
    return path


def save_beside(directory: Path, files: Mapping[str, Any], tokenizer: Any) -> None:
    """Write the JSON `files` that other libraries need (relative path → value) into `directory`, and the tokenizer if there are some.

    The tokenizer then pads at the end, as rows are padded here.
    """
    for name, value in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")
    if files:
        padded = deepcopy(tokenizer)
        padded.padding_side = "right"
        padded.save_pretrained(str(directory))


def save_model(
    directory: Path | str,
    model: Model,
    params: Params,
    *,
    tokenizer: Any = None,
    label_names: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> Path:
    """Write `params` (from `merge`) with the model's config and tokenizer; return the weights' file, in torch's layout.

    `problem_type` is transformers' name of the loss that a classifier was trained with; None keeps that of the base's config.
    Quantised kernels are stored in bitsandbytes' format, and the config names that format.
    """
    from safetensors.numpy import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    leaves = leaf_paths(params)
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in leaves.items():
        if is_quantized(leaf):
            tensors |= stored_tensors(torch_name(path), leaf)
        else:
            tensors[torch_name(path)] = to_torch_layout(path, np.asarray(leaf, np.float32))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [model.torch_class]
    config.dtype = "float32"  # of the file, whatever the dtype of the base was
    config.__dict__.pop("quantization_config", None)  # of the base it was loaded from
    if quantized := next(filter(is_quantized, leaves.values()), None):
        kept = {
            path.removesuffix("/kernel")
            for path, leaf in leaves.items()
            if path.endswith("/kernel") and not is_quantized(leaf)
        }
        # With a decoder that is tied, and has no leaf.
        heads = {path.split("/")[0] for path in leaves if not under(path, [model.base_prefix])}
        config.quantization_config = quantization_config(
            Quantization.of(quantized), sorted(heads | {path.replace("/", ".") for path in kept})
        )
    if label_names:
        config.id2label, config.label2id = label_maps(label_names)
    if problem_type:
        config.problem_type = problem_type
    config.save_pretrained(str(directory))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    return directory / "model.safetensors"
