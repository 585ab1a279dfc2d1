"""Formats of 4 bits per weight, the frozen base of QLoRA (Dettmers et al. 2023, section 3).

    weight ≈ values[code] * absmax       one 4-bit code per weight, one float32 absmax = max |weight| per block

Each format has its own 16 values (`nf4.py`, `fp4.py`). Storage is bitsandbytes', bit for bit: torch's `[out, in]`
flattened row-major, two codes a byte, the even one in the high half.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.quantization import NUMBER_FORMATS
from jaxpeft.quantization.base import NumberFormat, Quantization, QuantizedTensor
from jaxpeft.quantization.codebook import Codebook
from jaxpeft.quantization.double_quantization import (
    QuantizedAbsmax,
    dequantize_absmax,
    quantize_absmax,
    quantized_absmax_shape,
)

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""The weights per absmax to choose from: bitsandbytes' own. Its version 0.50 also takes 32."""

_SMALLEST_ABSMAX = np.float32(1e-38)  # bitsandbytes' guard for blocks of zeros
_WEIGHTS_PER_CHUNK = 1 << 18  # 1 MB of float32: temporaries stay in the cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FourBitTensor(QuantizedTensor):
    """A Flax kernel `[in, out]` in 4 bits: a pytree of its arrays, so jit, device_put and eval_shape take it.

    Attributes:
        codes: uint8 `[ceil(in * out / 2)]`, two codes a byte, in the order of torch's `[out, in]`.
        absmax: one scale per block: float32 `[num_blocks]`, or the same in 8 bits each (double quantisation).
        shape: `(in, out)`, the Flax kernel's; static.
        block_size: weights per absmax; static.
        data_type: name of a `FourBit` format; static.
    """

    codes: jax.Array | np.ndarray
    absmax: jax.Array | np.ndarray | QuantizedAbsmax
    shape: tuple[int, int] = field(metadata={"static": True})
    block_size: int = field(metadata={"static": True})
    data_type: str = field(metadata={"static": True})

    def scheme(self) -> Quantization:
        """The tensor's format, block size and kind of scales."""
        return Quantization(self.data_type, self.block_size, isinstance(self.absmax, QuantizedAbsmax))

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The kernel `[in, out]` in `dtype`. Products are float32, cast last."""
        absmax = self.absmax
        absmax = dequantize_absmax(absmax) if isinstance(absmax, QuantizedAbsmax) else jnp.asarray(absmax)
        codes = jnp.asarray(self.codes)
        absmax = jnp.repeat(absmax, self.block_size // 2)[: codes.size]  # per byte: no byte straddles two blocks
        number_format: FourBit = NUMBER_FORMATS[self.data_type]
        unpack = functools.partial(_unpack, values=number_format.codebook.values, dtype=dtype)
        d_in, d_out = self.shape
        if d_in % 2:  # a byte may straddle two of torch's rows: unpack in torch's order, transpose last
            return unpack(codes, absmax).reshape(-1)[: self.size].reshape(d_out, d_in).T
        # Transpose first and stack in front of `out`. A TPU pads a last axis of 2 to 128: stacked there, a kernel
        # [768, 3072] needs 302 MB of temporaries (compiled for v5e); stacked here, none.
        codes, absmax = (array.reshape(d_out, d_in // 2).T for array in (codes, absmax))
        return unpack(codes, absmax).reshape(d_in, d_out)


@dataclass(frozen=True, eq=False)  # eq=False: one object for each format, and arrays have no hash
class FourBit(NumberFormat):
    """A 4-bit format: blocks of weights with one scale each, and 16 values between -1 and 1."""

    name: str
    title: str
    codebook: Codebook
    citation: str = "QLoRA: Dettmers et al. 2023, arXiv 2305.14314"

    def quantize(self, kernel: np.ndarray, *, block_size: int, double_quantization: bool) -> FourBitTensor:
        """Store `kernel: [in, out]`. Codes and float32 absmax equal bitsandbytes' bit for bit.

        Args:
            kernel: float32 or a 16-bit float.
            block_size: weights per absmax, one of `BLOCK_SIZES`. The last block may be short.
            double_quantization: True: hold each absmax in 8 bits as well (`double_quantization.py`).

        Raises:
            InputError: if the block size is unknown, or weights are not finite.
        """
        if block_size not in BLOCK_SIZES:
            raise InputError(f"{self.name} block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        d_in, d_out = kernel.shape
        codes = np.empty(-(-kernel.size // 2), np.uint8)
        absmax = np.empty(-(-kernel.size // block_size), np.float32)
        start = 0
        # On the host, because bitsandbytes' bits need an exact division and a device's need not be exact. A megabyte at
        # a time, so that loading a model needs little more memory than the result.
        for weights in _chunks_in_torch_order(kernel, block_size):
            chunk_codes, chunk_absmax = _quantize_flat(weights, block_size, self.codebook)
            codes[start // 2 :][: chunk_codes.size] = chunk_codes
            absmax[start // block_size :][: chunk_absmax.size] = chunk_absmax
            start += weights.size
        scales = quantize_absmax(absmax) if double_quantization else absmax
        return FourBitTensor(codes, scales, (d_in, d_out), block_size, self.name)

    def shape_of(self, shape: tuple[int, int], quantization: Quantization) -> FourBitTensor:
        """The result of `quantize` for a kernel of `shape`, with a `jax.ShapeDtypeStruct` for each array."""
        size, block_size = math.prod(shape), quantization.block_size
        num_blocks = -(-size // block_size)
        double = quantization.double_quantization
        absmax: Any = quantized_absmax_shape(num_blocks) if double else _array((num_blocks,), jnp.float32)
        return FourBitTensor(_array((-(-size // 2),), jnp.uint8), absmax, shape, block_size, self.name)

    def in_words(self, quantization: Quantization) -> str:
        """The format with its block size, and whether the scales are quantised too."""
        scales = "with" if quantization.double_quantization else "without"
        return f"{self.name} in blocks of {quantization.block_size} {scales} double quantisation"


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _chunks_in_torch_order(kernel: np.ndarray, block_size: int) -> Iterator[np.ndarray]:
    """`kernel` in float32 and torch's row-major `[out, in]`, cut into pieces. All but the last hold whole blocks."""
    d_in, d_out = kernel.shape
    rows_per_block = block_size // math.gcd(d_in, block_size)  # the fewest torch rows that end where a block ends
    rows = rows_per_block * max(1, _WEIGHTS_PER_CHUNK // (d_in * rows_per_block))
    for row in range(0, d_out, rows):
        yield kernel[:, row : row + rows].T.astype(np.float32, order="C").reshape(-1)


def _quantize_flat(weights: np.ndarray, block_size: int, codebook: Codebook) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes uint8 `[ceil(n / 2)]` and absmax float32 `[ceil(n / block_size)]` of `weights: [n]`."""
    whole, last = np.split(weights, [weights.size - weights.size % block_size])
    blocks = whole.reshape(-1, block_size)
    absmax = np.abs(blocks).max(axis=1, initial=0)
    if last.size:  # bitsandbytes divides here, where it multiplies below, and keeps the guarded absmax
        absmax = np.append(absmax, np.maximum(np.abs(last).max(), _SMALLEST_ABSMAX))
    if not np.isfinite(absmax).all():  # a block's maximum carries its NaN and its infinity
        raise InputError("cannot quantise a kernel that holds NaN or infinite weights")
    normalised = np.zeros(weights.size + weights.size % 2, np.float32)  # an odd last byte ends with the code of 0
    reciprocals = np.float32(1) / np.maximum(absmax[: len(blocks)], _SMALLEST_ABSMAX)
    np.multiply(blocks, reciprocals[:, None], out=normalised[: whole.size].reshape(blocks.shape))
    np.divide(last, absmax[-1], out=normalised[whole.size : weights.size])
    codes = codebook.nearest_codes(normalised)
    return codes[::2] << 4 | codes[1::2], absmax


def _unpack(codes: jax.Array, absmax: jax.Array, *, values: np.ndarray, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The two weights of each byte, on a new axis 1. `codes` and `absmax` have one entry per byte, and one shape."""
    halves = (codes >> 4, codes & 0xF)
    return jnp.stack([(_look_up(half, values) * absmax).astype(dtype) for half in halves], axis=1)


def _look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` as a tree of 15 selections, one bit of the code each."""
    # On a CPU this is as fast as a gather. A TPU has no fast gather: there it halves the memory traffic.
    values = [jnp.float32(value) for value in table]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
