"""Quantised kernels on disk: the tensors of bitsandbytes in safetensors, and transformers' entry in config.json.

A 4-bit weight `X.weight` is uint8 codes `[n / 2, 1]`. Beside it are `X.weight.absmax` (float32, or uint8 if quantised
too), `X.weight.quant_map` (the format's 16 values), `X.weight.nested_absmax` and `.nested_quant_map`, and
`X.weight.quant_state.bitsandbytes__nf4` or `__fp4`: JSON in bytes with the data type, block size, torch shape, torch dtype
and the nested offset. An int8 weight is int8 `[out, in]` with `X.SCB`, float32 `[out]`, and `X.weight_format`, 0 for
row-major. Source: bitsandbytes 0.50, `functional.QuantState.as_dict` and `nn.Linear8bitLt._save_to_state_dict`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.quantization import NUMBER_FORMATS, FourBitTensor, Int8Tensor, Quantization, QuantizedTensor
from jaxpeft.quantization.double_quantization import NESTED_BLOCK_SIZE, QuantizedAbsmax
from jaxpeft.quantization.dynamic_map import create_dynamic_map
from jaxpeft.quantization.four_bit import BLOCK_SIZES

Reader = Callable[[str], np.ndarray]
"""Torch's name of a tensor → the tensor. Raises InputError if the files lack it."""

_STATE = "quant_state.bitsandbytes__"
_ROW_MAJOR = 0


def is_stored_quantized(name: str, names: Container[str]) -> bool:
    """True if `names`, of all tensors in a file, include those that bitsandbytes writes beside the weight `name` (`X.weight`)."""
    return f"{name}.absmax" in names or _int8_scales(name) in names


def read_quantized(name: str, names: Container[str], read: Reader) -> QuantizedTensor:
    """The quantised weight `name` (`X.weight`) as a Flax kernel; its arrays are numpy arrays.

    Raises:
        InputError: if a part is missing, does not fit the others or is of a kind that bitsandbytes does not write.
    """
    return _read_int8(name, names, read) if _int8_scales(name) in names else _read_four_bit(name, names, read)


def stored_tensors(name: str, tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    """The tensors of a file, by torch's names, that store `tensor` as the weight `name` (`X.weight`).

    The inverse of `read_quantized`.

    Raises:
        InputError: if bitsandbytes has no such number format.
    """
    return _layout_of(tensor.scheme()).tensors(name, tensor)


def quantization_config(quantization: Quantization, kept_modules: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json with which transformers loads such weights through bitsandbytes.

    Args:
        quantization: the scheme of all kernels.
        kept_modules: torch modules whose linear layers are not quantised, by full name or by outermost name.

    Raises:
        InputError: if bitsandbytes has no such number format.
    """
    options = _layout_of(quantization).options(quantization)
    return {"quant_method": "bitsandbytes", "llm_int8_skip_modules": list(kept_modules), **options}


def check_storable(quantization: Quantization) -> None:
    """Refuse a number format that has no files.

    Raises:
        InputError: if bitsandbytes does not have the format.
    """
    _layout_of(quantization)


def check_method(config: Mapping[str, Any] | None, where: str) -> None:
    """Refuse a checkpoint whose `quantization_config` names another method than bitsandbytes'.

    Raises:
        InputError: for such a method.
    """
    method = (config or {}).get("quant_method") or "bitsandbytes"
    if method != "bitsandbytes":
        raise InputError(
            f"{where} is quantised by '{method}'; only bitsandbytes' 4-bit and int8 checkpoints are read: "
            "take the full-precision model"
        )


def _int8_scales(name: str) -> str:
    return f"{name.removesuffix('.weight')}.SCB"


def _int8_tensors(name: str, tensor: Int8Tensor) -> dict[str, np.ndarray]:
    return {
        name: np.ascontiguousarray(np.asarray(tensor.values).T),
        _int8_scales(name): np.asarray(tensor.absmax),
        f"{name}_format": np.asarray(_ROW_MAJOR, np.uint8),
    }


def _int8_options(quantization: Quantization) -> dict[str, Any]:
    return {"load_in_4bit": False, "load_in_8bit": True}


def _four_bit_tensors(name: str, tensor: FourBitTensor) -> dict[str, np.ndarray]:
    d_in, d_out = tensor.shape
    state: dict[str, Any] = {
        "quant_type": tensor.data_type,
        "blocksize": tensor.block_size,
        "dtype": "float32",
        "shape": [d_out, d_in],
    }
    parts = {"quant_map": _values(tensor.data_type)}
    if isinstance(tensor.absmax, QuantizedAbsmax):
        parts["absmax"] = np.asarray(tensor.absmax.codes)
        parts["nested_absmax"] = np.asarray(tensor.absmax.nested_absmax)
        parts["nested_quant_map"] = create_dynamic_map()
        state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        state["nested_offset"] = float(tensor.absmax.offset)  # a float32 survives JSON's float64 bit for bit
    else:
        parts["absmax"] = np.asarray(tensor.absmax)
    parts[_STATE + tensor.data_type] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {
        name: np.asarray(tensor.codes).reshape(-1, 1),
        **{f"{name}.{part}": array for part, array in parts.items()},
    }


def _four_bit_options(quantization: Quantization) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization.data_type,
        "bnb_4bit_use_double_quant": quantization.double_quantization,
    }


@dataclass(frozen=True)
class _Layout:
    """How one number format is written: (name, tensor) → tensors of the file; scheme → its part of the config."""

    tensors: Callable[[str, Any], dict[str, np.ndarray]]
    options: Callable[[Quantization], dict[str, Any]]


_FOUR_BIT = _Layout(_four_bit_tensors, _four_bit_options)
_LAYOUTS = {"nf4": _FOUR_BIT, "fp4": _FOUR_BIT, "int8": _Layout(_int8_tensors, _int8_options)}
"""The number formats that bitsandbytes has. All others live in memory only."""


def _layout_of(quantization: Quantization) -> _Layout:
    if quantization.data_type not in _LAYOUTS:
        raise InputError(
            f"a base in {quantization.data_type} cannot be written to files: bitsandbytes has {', '.join(_LAYOUTS)} only; "
            f"quantise while loading instead (--model.quantization {quantization.data_type})"
        )
    return _LAYOUTS[quantization.data_type]


def _values(kind: str) -> np.ndarray:
    return NUMBER_FORMATS[kind].codebook.values


def _read_int8(name: str, names: Container[str], read: Reader) -> Int8Tensor:
    values, absmax = read(name), read(_int8_scales(name))
    _check(
        values.dtype == np.int8 and values.ndim == 2, name, f"{values.dtype} {list(values.shape)} beside int8 scales"
    )
    _check(absmax.size == len(values), name, f"{absmax.size} scales for {len(values)} channels")
    if f"{name}_format" in names:
        layout = int(read(f"{name}_format").reshape(-1)[0])
        _check(layout == _ROW_MAJOR, name, f"weight_format {layout}; only 0, row-major, is written today")
    return Int8Tensor(np.ascontiguousarray(values.T), absmax.reshape(-1).astype(np.float32))


def _read_four_bit(name: str, names: Container[str], read: Reader) -> FourBitTensor:
    kinds = [kind for kind, layout in _LAYOUTS.items() if layout is _FOUR_BIT and f"{name}.{_STATE}{kind}" in names]
    _check(len(kinds) == 1, name, f"{len(kinds)} tensors {_STATE}… beside it")
    state = _read_state(name, kinds[0], read)
    codes, absmax = read(name), read(f"{name}.absmax")
    d_out, d_in = state["shape"]
    num_blocks = -(-d_in * d_out // state["blocksize"])
    # The codes may be stored under another type (bnb_4bit_quant_storage): the bytes are the same.
    codes = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    _check(codes.size == -(-d_in * d_out // 2), name, f"{codes.size} bytes for {d_in * d_out} weights")
    _check(absmax.size == num_blocks, name, f"{absmax.size} scales for {num_blocks} blocks")
    _check_map(name, "quant_map", _values(kinds[0]), read)
    scales = absmax.reshape(-1)
    nested = _read_nested(name, scales, state, read) if scales.dtype == np.uint8 else scales.astype(np.float32)
    return FourBitTensor(codes, nested, (d_in, d_out), state["blocksize"], kinds[0])


def _read_state(name: str, kind: str, read: Reader) -> dict[str, Any]:
    """The fields of the JSON beside a 4-bit weight that are used here, checked."""
    try:
        state = json.loads(read(f"{name}.{_STATE}{kind}").tobytes())
        values: dict[str, Any] = {"shape": tuple(map(int, state["shape"])), "blocksize": int(state["blocksize"])}
        values |= {key: state[key] for key in ("quant_type", "nested_blocksize", "nested_offset") if key in state}
    except (ValueError, TypeError, KeyError) as error:
        raise _malformed(name, f"a {_STATE}{kind} that cannot be read") from error
    _check(values.get("quant_type") == kind, name, f"quant_type {values.get('quant_type')} in {_STATE}{kind}")
    _check(len(values["shape"]) == 2 and min(values["shape"]) > 0, name, f"shape {list(values['shape'])}")
    if values["blocksize"] not in BLOCK_SIZES:
        raise InputError(
            f"{name} has blocks of {values['blocksize']} weights; those read are {', '.join(map(str, BLOCK_SIZES))}"
        )
    return values


def _read_nested(name: str, codes: np.ndarray, state: Mapping[str, Any], read: Reader) -> QuantizedAbsmax:
    nested_absmax = read(f"{name}.nested_absmax").reshape(-1)
    _check_map(name, "nested_quant_map", create_dynamic_map(), read)
    num_blocks = -(-codes.size // NESTED_BLOCK_SIZE)
    _check(nested_absmax.size == num_blocks, name, f"{nested_absmax.size} nested scales for {num_blocks} blocks")
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    _check(size == NESTED_BLOCK_SIZE, name, f"nested blocks of {size}; bitsandbytes writes {NESTED_BLOCK_SIZE}")
    _check(isinstance(offset, int | float), name, f"nested_offset {offset}")
    return QuantizedAbsmax(codes, nested_absmax.astype(np.float32), np.asarray(offset, np.float32))


def _check_map(name: str, part: str, expected: np.ndarray, read: Reader) -> None:
    found = read(f"{name}.{part}").reshape(-1)
    # A device that divides FP4's values by 12 may give another last bit.
    same = found.size == expected.size and np.allclose(found, expected, rtol=0, atol=1e-6)
    _check(same, name, f"a {part} that is not bitsandbytes'")


def _check(fine: bool, name: str, found: str) -> None:
    if not fine:
        raise _malformed(name, found)


def _malformed(name: str, found: str) -> InputError:
    return InputError(
        f"{name} is no whole quantised weight of bitsandbytes: it has {found}; fetch or quantise it again"
    )
