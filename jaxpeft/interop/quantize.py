"""A model's directory with its linear layers in 4 or 8 bits, for runs here and for bitsandbytes in torch."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.interop.transformers_files import new_directory
from jaxpeft.models.build import TASKS, AbstractModel, Task, build_abstract_model, checked, read_config
from jaxpeft.models.quantized_files import check_storable, quantization_config, stored_tensors
from jaxpeft.models.sources import TOKENIZER_FILES, Source, resolve
from jaxpeft.models.weights import Checkpoint, open_checkpoint, to_torch_layout, torch_name
from jaxpeft.quantization import Quantization, is_quantized, quantize


@dataclass(frozen=True)
class Sizes:
    """What was written: the quantised kernels, their weights and bytes, and the bytes of all leaves and of the file."""

    num_kernels: int
    weights: int
    quantized_bytes: int
    full_bytes: int
    file_bytes: int


def quantize_model(name: str, output: Path | str, quantization: Quantization, *, task: Task | None = None) -> Sizes:
    """Write the model `name` with the encoder's linear layers quantised: weights, config and the tokenizer's files.

    Leaves come one at a time and stand in full precision one at a time, but for those that stay so: embeddings, norms,
    biases and heads. What neither task has in Flax (a next-sentence head) is left out. A checkpoint without a head is
    written without one.

    Args:
        name: hub id, directory or `package:module/folder`.
        output: a directory that does not exist yet, or is empty.
        quantization: how to store the kernels.
        task: write what the model for this task has, and no more; by default all that the checkpoint holds for either.
            transformers 4.57 fails on quantised layers that a model has no place for: a bare BERT's pooler, in
            `AutoModelForMaskedLM`.

    Raises:
        InputError: as `load_model`; if bitsandbytes lacks the number format, the output is not empty, or the model is
            quantised already.
    """
    from safetensors.numpy import save_file

    check_storable(quantization)
    directory = new_directory(output)
    source = resolve(name)
    config = read_config(source)
    abstracts = _abstract_models(config)
    chosen = [build_abstract_model(config, task)] if task else abstracts
    base_prefix = abstracts[0].base_prefix
    shapes = {path: shape for abstract in chosen for path, shape in abstract.shapes.items()}
    kernels = {path for abstract in chosen for path in abstract.base_kernels}
    reader = open_checkpoint(source.directory, list(shapes), base_prefix)
    # A bare encoder's names begin below the prefix.
    above = "" if any(not path.startswith(base_prefix + "/") for path in reader.readers) else base_prefix + "."
    tensors: dict[str, np.ndarray] = {}
    quantized = []
    for path in reader.readers:
        leaf = _read(reader, path, shapes[path].shape, source)
        torch_path = torch_name(path).removeprefix(above)
        if path in kernels:
            tensor = quantize(leaf, **vars(quantization))
            tensors |= stored_tensors(torch_path, tensor)
            quantized.append(tensor)
        else:
            tensors[torch_path] = to_torch_layout(path, leaf)
    if not quantized:
        raise InputError(f"{source.description} holds no linear layer of the encoder '{base_prefix}' to quantise")
    kept = _kept_modules(abstracts, reader.readers.keys())
    config.quantization_config = quantization_config(quantization, kept)
    config.dtype = "float32"  # what the file holds besides
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER_FILES:
        if (source.directory / file).is_file():
            shutil.copyfile(source.directory / file, directory / file)
    config.save_pretrained(str(directory))  # last: a directory without it is no model
    return Sizes(
        num_kernels=len(quantized),
        weights=sum(tensor.size for tensor in quantized),
        quantized_bytes=sum(tensor.size_bytes for tensor in quantized),
        full_bytes=sum(4 * int(np.prod(shapes[path].shape)) for path in reader.readers),
        file_bytes=(directory / "model.safetensors").stat().st_size,
    )


def _abstract_models(config: Any) -> list[AbstractModel]:
    """The model for each task that its architecture has: together they know every leaf that is used here."""
    found, refused = [], []
    for task in TASKS:
        try:
            found.append(build_abstract_model(config, task))
        except InputError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return found


def _read(reader: Checkpoint, path: str, shape: tuple[int, ...], source: Source) -> np.ndarray:
    leaf = checked(reader.read(path), path, shape, source)
    if is_quantized(leaf):
        raise InputError(
            f"{source.description} is quantised already, to {Quantization.of(leaf)}: quantise the full-precision model"
        )
    return leaf


def _kept_modules(abstracts: Sequence[AbstractModel], held: Collection[str]) -> list[str]:
    """Torch's names of what bitsandbytes must not expect quantised: the heads, and layers that the checkpoint lacks."""
    prefix = abstracts[0].base_prefix
    heads = {path.split("/")[0] for abstract in abstracts for path in abstract.shapes} - {prefix}
    absent = {path for abstract in abstracts for path in abstract.base_kernels if path not in held}
    layers = {path.removesuffix("/kernel").replace("/", ".") for path in absent}
    # With and without the prefix: AutoModel builds the encoder without it.
    return sorted(heads | layers | {layer.removeprefix(prefix + ".") for layer in layers})
