"""Write a model with its linear layers in 4 or 8 bits, for runs here and for bitsandbytes in torch."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.interop.transformers_files import new_directory
from jaxpeft.models.build import AbstractModel, build_abstract_model, checked, read_config
from jaxpeft.models.heads import HEADS
from jaxpeft.models.quantized_files import check_storable, quantization_config, stored_tensors
from jaxpeft.models.sources import TOKENIZER_FILES, Source, resolve
from jaxpeft.models.weights import Checkpoint, open_checkpoint, to_torch_layout, torch_name
from jaxpeft.quantization import Quantization, is_quantized, quantize
from jaxpeft.trees import below, under


@dataclass(frozen=True)
class Sizes:
    """Sizes of a written model: number, weights and bytes of the quantised kernels; bytes of all leaves in fp32, and of the file."""

    num_kernels: int
    weights: int
    quantized_bytes: int
    full_bytes: int
    file_bytes: int


def quantize_model(name: str, output: Path | str, quantization: Quantization, *, task: str | None = None) -> Sizes:
    """Write the model `name` with the encoder's linear layers quantised: weights, config and the tokenizer's files.

    Leaves are read one at a time, so only one kernel at a time is in full precision. Embeddings, norms, biases and heads stay in full
    precision. A head that no task has in Flax (next-sentence prediction) is left out. A checkpoint without a head is written
    without one.

    Args:
        name: hub id, directory or `package:module/folder`.
        output: a directory that does not exist yet, or is empty.
        quantization: how to store the kernels.
        task: write only the leaves of the model for this task; by default all that the checkpoint has for any task.
            transformers 4.57 fails if a file has a quantised layer that the model lacks, such as the pooler of a bare BERT in
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
    encoder = abstracts[0].base_prefix
    shapes = {path: shape for abstract in chosen for path, shape in abstract.shapes.items()}
    kernels = {path for abstract in chosen for path in abstract.base_kernels}
    reader = open_checkpoint(source.directory, list(shapes), encoder)
    # A bare encoder's names begin below the prefix.
    above = encoder + "." if all(under(path, [encoder]) for path in reader.readers) else ""
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
        raise InputError(f"{source.description} holds no linear layer of the encoder '{encoder}' to quantise")
    held = {path if chosen[0].base_prefix else below(encoder, path) for path in reader.readers}
    kept = _kept_modules(abstracts, held)
    config.quantization_config = quantization_config(quantization, kept)
    config.dtype = "float32"  # of the leaves that are not quantised
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for file in TOKENIZER_FILES:
        if (source.directory / file).is_file():
            shutil.copyfile(source.directory / file, directory / file)
    config.save_pretrained(
        str(directory)
    )  # last: without its config a directory is not a model, so an interrupted write is noticed
    return Sizes(
        num_kernels=len(quantized),
        weights=sum(tensor.size for tensor in quantized),
        quantized_bytes=sum(tensor.size_bytes for tensor in quantized),
        full_bytes=sum(4 * int(np.prod(shapes[path].shape)) for path in reader.readers),
        file_bytes=(directory / "model.safetensors").stat().st_size,
    )


def _abstract_models(config: Any) -> list[AbstractModel]:
    """The models with a head that the architecture has: together they have every leaf that is used here."""
    found, refused = [], []
    for task in (name for name in HEADS if not HEADS[name].is_bare):
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
    """Torch's names of the modules that bitsandbytes must not expect quantised: heads, and layers that the checkpoint lacks."""
    prefix = abstracts[0].base_prefix
    heads = {path.split("/")[0] for abstract in abstracts for path in abstract.shapes} - {prefix}
    absent = {path for abstract in abstracts for path in abstract.base_kernels if path not in held}
    layers = {path.removesuffix("/kernel").replace("/", ".") for path in absent}
    # With and without the prefix: AutoModel builds the encoder without it.
    return sorted(heads | layers | {layer.removeprefix(prefix + ".") for layer in layers})
