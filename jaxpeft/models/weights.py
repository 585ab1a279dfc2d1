"""Reads weights from disk leaf by leaf under Flax's names: safetensors of torch or bitsandbytes, or Flax msgpack.

transformers' own loader reads a file whole. Here a 4-bit base must never have more than one layer in full precision, and the leaves
that a checkpoint lacks must be known before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.models.msgpack_files import msgpack_leaves
from jaxpeft.models.quantized_files import is_stored_quantized, read_quantized
from jaxpeft.quantization import QuantizedTensor, is_quantized
from jaxpeft.trees import under

# Flax's name of a leaf → torch's, newest first (old BERT checkpoints say gamma and beta).
_TORCH_LEAVES = {
    "kernel": ("weight",),
    "embedding": ("weight",),
    "scale": ("weight", "gamma"),
    "bias": ("bias", "beta"),
}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. `readers` maps each leaf path in it to a function that reads the leaf, in Flax's layout."""

    readers: Mapping[str, Callable[[], np.ndarray | QuantizedTensor]]

    def __contains__(self, path: str) -> bool:
        return path in self.readers

    def read(self, path: str) -> np.ndarray | QuantizedTensor:
        """Read the leaf at `path`: fp32, or quantised if the file stores it so.

        Raises:
            InputError: if the file has neither floats nor a complete quantised weight there.
        """
        leaf = self.readers[path]()
        if is_quantized(leaf):
            return leaf
        array = np.asarray(leaf)
        if array.dtype.kind in "iub":
            raise InputError(
                f"{path} is stored as {array.dtype} without the scales of a quantised weight; fetch it again"
            )
        return array.astype(np.float32, copy=False)


def torch_name(path: str) -> str:
    """Return torch's name of a Flax leaf path: `a.b.weight` for `a/b/kernel`."""
    layer, _, leaf = path.rpartition("/")
    return f"{layer.replace('/', '.')}.{_TORCH_LEAVES[leaf][0]}"


def to_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Return a Flax leaf in torch's layout, or the other way: a kernel is the transpose of a weight."""
    return np.ascontiguousarray(array.T) if path.endswith("/kernel") else array


def open_checkpoint(directory: Path, paths: list[str], encoder: str) -> Checkpoint:
    """Open the weights in `directory` for the Flax leaves `paths`.

    `encoder` is the name of the encoder in a model with a head (`bert`). The names in the files of a bare encoder do not begin with
    it, and neither do the `paths` of one. So each kind of file can be read for each kind of model.

    Raises:
        InputError: if there are no weights, or only pickled ones, or if none of them belongs to this model.
    """
    if (directory / "model.safetensors").is_file() or (directory / "model.safetensors.index.json").is_file():
        readers = dict(_torch_readers(_safetensors_files(directory), paths, encoder))
    elif (directory / "flax_model.msgpack").is_file():
        readers = dict(_flax_readers(directory / "flax_model.msgpack", paths, encoder))
    else:
        raise InputError(_no_weights(directory))
    if not readers:
        raise InputError(
            f"the weights in {directory} have no tensor of this model (prefix '{encoder}'): is config.json theirs?"
        )
    return Checkpoint(readers)


def without_other_classes(
    reader: Checkpoint, shapes: Mapping[str, Any], base_prefix: str, num_labels: int | None
) -> tuple[Checkpoint, int | None]:
    """`reader` without the leaves of a classifier for another number of classes than `num_labels`.

    Args:
        reader: an opened checkpoint.
        shapes: leaf path → the shape that the model needs (anything with `.shape`).
        base_prefix: the encoder's; a classifier is outside it.
        num_labels: the number of classes; None if the model is no classifier.

    Returns:
        the checkpoint without them, and the number of classes of its own classifier; None if that is `num_labels`.
    """
    if num_labels is None:
        return reader, None
    others = {}
    for path in reader.readers:
        if not under(path, [base_prefix]):
            wanted, found = shapes[path].shape, reader.read(path).shape
            if found != wanted and wanted[-1:] == (num_labels,) and found[:-1] == wanted[:-1]:
                others[path] = found[-1]
    kept = {path: read for path, read in reader.readers.items() if path not in others}
    return Checkpoint(kept), next(iter(others.values()), None)


def _no_weights(directory: Path) -> str:
    pickled = next(iter(sorted(directory.glob("pytorch_model*.bin"))), None)
    if pickled:
        return (
            f"{pickled} is a pickle, which can run code when loaded; save it as safetensors: model.save_pretrained(dir)"
        )
    return f"no weights in {directory} (model.safetensors or flax_model.msgpack); --model.weights random trains from a bare config"


def _safetensors_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    try:
        return sorted({directory / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{index} is no index of safetensors; fetch it again") from error


def _torch_readers(files: list[Path], paths: list[str], encoder: str) -> Iterator[tuple[str, Callable]]:
    from safetensors import SafetensorError, safe_open

    where: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                where |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read as safetensors: {error}; fetch it again") from error
    for path in paths:
        for name in _torch_candidates(path, encoder):
            if name in where or is_stored_quantized(name, where):
                yield path, _torch_reader(where, name, path)
                break


def _torch_candidates(path: str, encoder: str) -> Iterator[str]:
    layer, _, leaf = path.rpartition("/")
    for name in _TORCH_LEAVES[leaf]:
        yield from (f"{place.replace('/', '.')}.{name}" for place in _places(layer, encoder))


def _places(path: str, encoder: str) -> tuple[str, str, str]:
    """`path` as a file may have it: as it is, without the encoder's name in front, and with it."""
    return path, path.removeprefix(encoder + "/"), f"{encoder}/{path}"


def _torch_reader(where: Mapping[str, Path], name: str, path: str) -> Callable[[], np.ndarray | QuantizedTensor]:
    def tensor(name: str) -> np.ndarray:
        import ml_dtypes  # noqa: F401  (gives numpy the bf16 that some files are in)
        from safetensors import safe_open

        if name not in where:
            directory = next(iter(where.values())).parent
            raise InputError(f"the weights in {directory} lack {name}, a part of a quantised weight; fetch them again")
        # Opened again for each tensor: the pages read from a mapped file count as the process's memory until it is closed.
        with safe_open(where[name], framework="numpy") as opened:
            return opened.get_tensor(name)

    def read() -> np.ndarray | QuantizedTensor:
        if is_stored_quantized(name, where):
            return read_quantized(name, where, tensor)
        return to_torch_layout(path, tensor(name))

    return read


def _flax_readers(file: Path, paths: list[str], encoder: str) -> Iterator[tuple[str, Callable]]:
    leaves = msgpack_leaves(file)
    for path in paths:
        for key in _places(path, encoder):
            if key in leaves:
                yield path, leaves[key]
                break
