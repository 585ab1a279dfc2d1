"""Packed adapters: the zeros of a pruned tensor are not stored. A bit mask says which entries are kept, and the kept values follow.

A packed adapter is `adapter_model.packed.safetensors` in the place of PEFT's `adapter_model.safetensors`, which PEFT does not find.
The names and shapes are those of PEFT's file. Version 1:

- metadata: `format` is "jaxpeft.packed", `version` is "1", and `shapes` is a JSON list with one entry for each key but "masks", in
  sorted order: the shape of the tensor if it is packed, or null if it is stored as it is.
- key → the tensor or, if it is packed, its kept values: one axis, in row-major order, in the tensor's dtype.
- "masks": uint8, the masks of all packed tensors in sorted order of their keys. Entry i of a tensor is bit i % 8 (the least
  significant is bit 0) of byte i // 8 of its mask; 1 = kept. Each mask begins at a byte; the bits behind its last entry are 0.

One array for all masks keeps the header short: a key of its own for each would cost a small adapter as many bytes as the mask.

An entry is kept unless all its bits are 0, so the round trip is exact: -0.0 and NaN are kept. A tensor is packed if that makes it
smaller. At 50 % in fp32 a packed tensor has 0.5 + 1/32 = 0.531 of its size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft.errors import InputError

FORMAT, VERSION = "jaxpeft.packed", "1"
MASKS = "masks"

Tensors = dict[str, np.ndarray]
"""PEFT's key → tensor, in torch's layout."""


def pack(tensors: Mapping[str, np.ndarray]) -> tuple[Tensors, dict[str, str]]:
    """The arrays and the metadata of the packed file that holds `tensors`."""
    stored: Tensors = {}
    masks, shapes = [np.zeros(0, np.uint8)], []
    for key in sorted(tensors):
        tensor = np.asarray(tensors[key], order="C")
        # Compare bits, not values: -0.0 equals 0.0, and would come back without its sign.
        kept = tensor.reshape(-1).view(f"u{tensor.itemsize}") != 0
        mask = np.packbits(kept, bitorder="little")
        smaller = kept.sum() * tensor.itemsize + mask.size < tensor.nbytes
        stored[key] = tensor.reshape(-1)[kept] if smaller else tensor
        shapes.append(list(tensor.shape) if smaller else None)
        masks += [mask] if smaller else []
    stored[MASKS] = np.concatenate(masks)
    return stored, {"format": FORMAT, "version": VERSION, "shapes": json.dumps(shapes, separators=(",", ":"))}


def unpack(stored: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None, file: str) -> Tensors:
    """Undo `pack`, exactly. `file` names the file in messages.

    Raises:
        InputError: if it is no packed file of this version, or if masks, shapes and values do not fit together.
    """
    shapes = _shapes(stored, metadata or {}, file)
    masks = stored.get(MASKS, np.zeros(0, np.uint8))
    lengths = {key: -(-math.prod(shape) // 8) for key, shape in shapes.items() if shape is not None}
    if masks.dtype != np.uint8 or masks.ndim != 1 or masks.size != sum(lengths.values()):
        raise InputError(
            f"{file} is damaged: its masks are {masks.dtype} of shape {masks.shape}, and its shapes ask for {sum(lengths.values())} "
            "bytes; fetch it again"
        )
    tensors, start = {}, 0
    for key, shape in shapes.items():
        if shape is None:
            tensors[key] = stored[key]
            continue
        bits = np.unpackbits(masks[start : start + lengths[key]], bitorder="little").astype(bool)
        start += lengths[key]
        size, values = math.prod(shape), stored[key]
        if bits[size:].any() or values.shape != (bits.sum(),):
            raise InputError(
                f"{file} is damaged: the mask of '{key}' keeps {bits.sum()} of {size} entries, and its values have shape {values.shape}; "
                "fetch it again"
            )
        dense = np.zeros(size, values.dtype)
        dense[bits[:size]] = values
        tensors[key] = dense.reshape(shape)
    return tensors


def _shapes(stored: Mapping[str, np.ndarray], metadata: Mapping[str, str], file: str) -> dict[str, list[int] | None]:
    """Key → the shape of a packed tensor, None if the tensor is stored as it is; in sorted order."""
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{file} is no packed adapter: the format in its metadata is {metadata.get('format')!r}, not '{FORMAT}'"
        )
    if metadata.get("version") != VERSION:
        raise InputError(
            f"{file} has version {metadata.get('version')!r} of the packed format, and this jaxpeft reads version {VERSION}; "
            "use the jaxpeft that wrote it to unpack it"
        )
    keys = sorted(key for key in stored if key != MASKS)
    try:
        shapes = json.loads(metadata["shapes"])
    except (KeyError, json.JSONDecodeError):
        shapes = None
    if not isinstance(shapes, list) or len(shapes) != len(keys) or not all(map(_is_shape, shapes)):
        raise InputError(
            f"{file} is damaged: its metadata does not list the shapes of its {len(keys)} tensors; fetch it again"
        )
    return dict(zip(keys, shapes, strict=True))


def _is_shape(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(type(axis) is int and axis >= 0 for axis in value)
