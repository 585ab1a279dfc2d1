"""NF4: a kernel in 4 bits per weight, the frozen base of QLoRA (Dettmers et al. 2023, section 3 and appendix E).

    weight ≈ NF4_VALUES[code] * absmax       one 4-bit code per weight, one float32 absmax = max |weight| per block

The 16 values are quantiles of N(0, 1) rescaled to [-1, 1], with one exact 0. Storage is bitsandbytes', bit for bit:
torch's `[out, in]` flattened row-major, two codes a byte, the even one in the high half.
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
from jaxpeft.quant.double_quantization import QuantizedAbsmax, dequantize_absmax, quantize_absmax

NF4_VALUES = np.asarray(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""float32 `[16]`: the NF4 data type (Dettmers et al. 2023, appendix E), ascending."""

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""The weights per absmax to choose from: bitsandbytes' (whose 0.50 also takes 32)."""

_MIDPOINTS = (NF4_VALUES[:-1] + NF4_VALUES[1:]) / 2
_SMALLEST_ABSMAX = np.float32(1e-38)  # bitsandbytes' guard for blocks of zeros
_WEIGHTS_PER_CHUNK = 1 << 18  # 1 MB of float32: temporaries stay in the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4Tensor:
    """A Flax kernel `[in, out]` in NF4: a pytree of its arrays, so jit, device_put and eval_shape take it.

    Attributes:
        codes: uint8 `[ceil(in * out / 2)]`, two codes a byte, in the order of torch's `[out, in]`.
        absmax: per block of weights: float32 `[num_blocks]`, or the same in 8 bits each (double quantisation).
        shape: `(in, out)`, the Flax kernel's; static.
        block_size: weights per absmax; static.
    """

    codes: jax.Array | np.ndarray
    absmax: jax.Array | np.ndarray | QuantizedAbsmax
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays held: codes and absmax, with its own absmax and offset where it is quantised too."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits held per weight: 4.5 with blocks of 64, 4.127 with double quantisation."""
        return 8 * self.size_bytes / self.size


def quantize(kernel: jax.Array | np.ndarray, *, block_size: int = 64, double_quantization: bool = True) -> Nf4Tensor:
    """The NF4 form of a Flax kernel `[in, out]`, computed on the host by numpy; its arrays are numpy arrays.

    Codes and float32 absmax equal bitsandbytes' bit for bit, for which division must be exact: on a device it need not
    be. Works through the kernel a megabyte at a time, so that loading needs little more memory than the result.

    Args:
        kernel: `[in, out]`, float32 or a 16-bit float.
        block_size: weights per absmax, one of `BLOCK_SIZES`. The last block may be short.
        double_quantization: whether to hold each absmax in 8 bits as well (`double_quantization.py`).

    Raises:
        InputError: the kernel is no matrix, empty, not of these dtypes or not finite; or an unknown block size.
    """
    _check(kernel, block_size)
    kernel = np.asarray(kernel)
    codes = np.empty(-(-kernel.size // 2), np.uint8)
    absmax = np.empty(-(-kernel.size // block_size), np.float32)
    start = 0
    for weights in _chunks_in_torch_order(kernel, block_size):
        chunk_codes, chunk_absmax = _quantize_flat(weights, block_size)
        codes[start // 2 :][: chunk_codes.size] = chunk_codes
        absmax[start // block_size :][: chunk_absmax.size] = chunk_absmax
        start += weights.size
    return Nf4Tensor(codes, quantize_absmax(absmax) if double_quantization else absmax, kernel.shape, block_size)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(tensor: Nf4Tensor, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The Flax kernel `[in, out]` in `dtype` that `tensor` stands for; pure, for use inside a jitted step.

    Products are float32, cast last. The result is as large as the full kernel: rematerialise (`jax.checkpoint`) the
    layer that uses it, else the backward pass keeps every dequantised kernel alive.
    """
    absmax = tensor.absmax
    absmax = dequantize_absmax(absmax) if isinstance(absmax, QuantizedAbsmax) else jnp.asarray(absmax)
    codes = jnp.asarray(tensor.codes)
    absmax = jnp.repeat(absmax, tensor.block_size // 2)[: codes.size]  # per byte: no byte straddles two blocks
    d_in, d_out = tensor.shape
    if d_in % 2:  # a byte may straddle two of torch's rows: unpack in torch's order, transpose last
        return _unpack(codes, absmax, dtype).reshape(-1)[: tensor.size].reshape(d_out, d_in).T
    # Transpose first and stack in front of `out`. A TPU pads a last axis of 2 to 128: stacked there, a kernel
    # [768, 3072] needs 302 MB of temporaries (compiled for v5e); stacked here, none.
    codes, absmax = (array.reshape(d_out, d_in // 2).T for array in (codes, absmax))
    return _unpack(codes, absmax, dtype).reshape(d_in, d_out)


def _check(kernel: jax.Array | np.ndarray, block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise InputError(f"NF4 block size {block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if kernel.ndim != 2 or kernel.size == 0:
        raise InputError(f"NF4 stores kernels [in, out]; got an array of shape {list(kernel.shape)}")
    if kernel.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise InputError(f"NF4 stores kernels of float32, bfloat16 or float16; got {kernel.dtype}")


def _chunks_in_torch_order(kernel: np.ndarray, block_size: int) -> Iterator[np.ndarray]:
    """`kernel` in float32 and in torch's row-major `[out, in]`, cut into pieces of whole blocks (but the very last)."""
    d_in, d_out = kernel.shape
    rows_per_block = block_size // math.gcd(d_in, block_size)  # the fewest torch rows that end where a block ends
    rows = rows_per_block * max(1, _WEIGHTS_PER_CHUNK // (d_in * rows_per_block))
    for row in range(0, d_out, rows):
        yield kernel[:, row : row + rows].T.astype(np.float32, order="C").reshape(-1)


def _quantize_flat(weights: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
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
    codes = _nearest_codes(normalised)
    return codes[::2] << 4 | codes[1::2], absmax


def _nearest_codes(normalised: np.ndarray) -> np.ndarray:
    """The index of the nearest NF4 value to each of `normalised: [n]`, uint8 `[n]`; a tie goes to the lower.

    Fifteen vectorised comparisons: twelve times faster than `np.searchsorted`, with the same result. Values beyond ±1
    (a rounded reciprocal) need no clipping: they are past the last midpoint anyway.
    """
    codes = np.zeros(normalised.shape, np.uint8)
    for midpoint in _MIDPOINTS:
        codes += (normalised > midpoint).view(np.uint8)
    return codes


def _unpack(codes: jax.Array, absmax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The two weights of each byte, on a new axis 1; `codes` and `absmax`, one per byte, have one shape."""
    return jnp.stack([(_look_up(nibble) * absmax).astype(dtype) for nibble in (codes >> 4, codes & 0xF)], axis=1)


def _look_up(codes: jax.Array) -> jax.Array:
    """`NF4_VALUES[codes]` as a tree of 15 selections, one bit of the code each.

    On a CPU as fast as a gather; on a TPU, which has no fast gather, half of its memory traffic.
    """
    values = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]
