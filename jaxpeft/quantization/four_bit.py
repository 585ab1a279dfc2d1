"""NF4 and FP4: a kernel in 4 bits per weight, the frozen base of QLoRA (Dettmers et al. 2023, section 3 and appendix E).

    weight ≈ values[code] * absmax       one 4-bit code per weight, one float32 absmax = max |weight| per block

The 16 values are those of the data type (`codebooks.py`). Storage is bitsandbytes', bit for bit: torch's `[out, in]`
flattened row-major, two codes a byte, the even one in the high half.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.quantization.codebooks import CODEBOOKS, nearest_codes
from jaxpeft.quantization.double_quantization import QuantizedAbsmax, dequantize_absmax, quantize_absmax
from jaxpeft.quantization.stored import StoredKernel

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""The weights per absmax to choose from: bitsandbytes' (whose 0.50 also takes 32)."""

_SMALLEST_ABSMAX = np.float32(1e-38)  # bitsandbytes' guard for blocks of zeros
_WEIGHTS_PER_CHUNK = 1 << 18  # 1 MB of float32: temporaries stay in the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FourBitTensor(StoredKernel):
    """A Flax kernel `[in, out]` in 4 bits: a pytree of its arrays, so jit, device_put and eval_shape take it.

    Attributes:
        codes: uint8 `[ceil(in * out / 2)]`, two codes a byte, in the order of torch's `[out, in]`.
        absmax: per block of weights: float32 `[num_blocks]`, or the same in 8 bits each (double quantisation).
        shape: `(in, out)`, the Flax kernel's; static.
        block_size: weights per absmax; static.
        data_type: "nf4" or "fp4"; static.
    """

    codes: jax.Array | np.ndarray
    absmax: jax.Array | np.ndarray | QuantizedAbsmax
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    data_type: str = dataclasses.field(metadata={"static": True})


def quantize_four_bit(
    kernel: np.ndarray, *, data_type: str, block_size: int, double_quantization: bool
) -> FourBitTensor:
    """The 4-bit form of a Flax kernel `[in, out]`, computed on the host by numpy; its arrays are numpy arrays.

    Codes and float32 absmax equal bitsandbytes' bit for bit, for which division must be exact: on a device it need not
    be. Works through the kernel a megabyte at a time, so that loading needs little more memory than the result.

    Args:
        kernel: `[in, out]`, float32 or a 16-bit float.
        data_type: "nf4" or "fp4".
        block_size: weights per absmax, one of `BLOCK_SIZES`. The last block may be short.
        double_quantization: whether to hold each absmax in 8 bits as well (`double_quantization.py`).

    Raises:
        InputError: an unknown block size, or weights that are not finite.
    """
    if block_size not in BLOCK_SIZES:
        raise InputError(f"{data_type} block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    codes = np.empty(-(-kernel.size // 2), np.uint8)
    absmax = np.empty(-(-kernel.size // block_size), np.float32)
    start = 0
    for weights in _chunks_in_torch_order(kernel, block_size):
        chunk_codes, chunk_absmax = _quantize_flat(weights, block_size, data_type)
        codes[start // 2 :][: chunk_codes.size] = chunk_codes
        absmax[start // block_size :][: chunk_absmax.size] = chunk_absmax
        start += weights.size
    stored = quantize_absmax(absmax) if double_quantization else absmax
    return FourBitTensor(codes, stored, kernel.shape, block_size, data_type)


def dequantize_four_bit(tensor: FourBitTensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The Flax kernel `[in, out]` in `dtype` that `tensor` stands for. Products are float32, cast last."""
    absmax = tensor.absmax
    absmax = dequantize_absmax(absmax) if isinstance(absmax, QuantizedAbsmax) else jnp.asarray(absmax)
    codes = jnp.asarray(tensor.codes)
    absmax = jnp.repeat(absmax, tensor.block_size // 2)[: codes.size]  # per byte: no byte straddles two blocks
    unpack = functools.partial(_unpack, values=CODEBOOKS[tensor.data_type], dtype=dtype)
    d_in, d_out = tensor.shape
    if d_in % 2:  # a byte may straddle two of torch's rows: unpack in torch's order, transpose last
        return unpack(codes, absmax).reshape(-1)[: tensor.size].reshape(d_out, d_in).T
    # Transpose first and stack in front of `out`. A TPU pads a last axis of 2 to 128: stacked there, a kernel
    # [768, 3072] needs 302 MB of temporaries (compiled for v5e); stacked here, none.
    codes, absmax = (array.reshape(d_out, d_in // 2).T for array in (codes, absmax))
    return unpack(codes, absmax).reshape(d_in, d_out)


def _chunks_in_torch_order(kernel: np.ndarray, block_size: int) -> Iterator[np.ndarray]:
    """`kernel` in float32 and in torch's row-major `[out, in]`, cut into pieces of whole blocks (but the very last)."""
    d_in, d_out = kernel.shape
    rows_per_block = block_size // math.gcd(d_in, block_size)  # the fewest torch rows that end where a block ends
    rows = rows_per_block * max(1, _WEIGHTS_PER_CHUNK // (d_in * rows_per_block))
    for row in range(0, d_out, rows):
        yield kernel[:, row : row + rows].T.astype(np.float32, order="C").reshape(-1)


def _quantize_flat(weights: np.ndarray, block_size: int, data_type: str) -> tuple[np.ndarray, np.ndarray]:
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
    codes = nearest_codes(normalised, data_type)
    return codes[::2] << 4 | codes[1::2], absmax


def _unpack(codes: jax.Array, absmax: jax.Array, *, values: np.ndarray, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The two weights of each byte, on a new axis 1; `codes` and `absmax`, one per byte, have one shape."""
    halves = (codes >> 4, codes & 0xF)
    return jnp.stack([(_look_up(half, values) * absmax).astype(dtype) for half in halves], axis=1)


def _look_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """`table[codes]` as a tree of 15 selections, one bit of the code each.

    On a CPU as fast as a gather; on a TPU, which has no fast gather, half of its memory traffic.
    """
    values = [jnp.float32(value) for value in table]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
