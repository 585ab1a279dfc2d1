"""What a quantised kernel is, of whatever data type: the tensor's union type, the choice between them, both directions."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError, did_you_mean
from jaxpeft.quantization.codebooks import CODEBOOKS
from jaxpeft.quantization.double_quantization import NESTED_BLOCK_SIZE, QuantizedAbsmax
from jaxpeft.quantization.four_bit import FourBitTensor, dequantize_four_bit, quantize_four_bit
from jaxpeft.quantization.int8 import Int8Tensor, dequantize_int8, quantize_int8

if TYPE_CHECKING:
    from typing_extensions import TypeIs

QuantizedTensor = FourBitTensor | Int8Tensor
"""A kernel `[in, out]` that is stored in 4 or 8 bits a weight."""

DataType = Literal["nf4", "fp4", "int8"]
DATA_TYPES = (*CODEBOOKS, "int8")
"""The data types to choose from."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How frozen linear kernels are stored; `str` says it in words, equal for schemes that store the same.

    Attributes:
        data_type: "nf4", "fp4" or "int8".
        block_size: weights per scale, one of `BLOCK_SIZES`; int8 has a scale per output channel instead.
        double_quantization: hold those scales in 8 bits too; int8 does not.
    """

    data_type: DataType = "nf4"
    block_size: int = 64
    double_quantization: bool = True

    def __str__(self) -> str:
        if self.data_type == "int8":
            return "int8"
        scales = "with" if self.double_quantization else "without"
        return f"{self.data_type} in blocks of {self.block_size} {scales} double quantisation"

    @staticmethod
    def of(tensor: QuantizedTensor) -> Quantization:
        """The scheme that `tensor` is stored in."""
        if isinstance(tensor, Int8Tensor):
            return Quantization("int8")
        data_type: Any = tensor.data_type
        return Quantization(data_type, tensor.block_size, isinstance(tensor.absmax, QuantizedAbsmax))


def is_quantized(leaf: Any) -> TypeIs[QuantizedTensor]:
    """Whether `leaf` is a quantised kernel rather than an array; usable as `is_leaf` of `jax.tree`'s functions."""
    return isinstance(leaf, QuantizedTensor)


def quantize(
    kernel: jax.Array | np.ndarray,
    *,
    data_type: str = "nf4",
    block_size: int = 64,
    double_quantization: bool = True,
) -> QuantizedTensor:
    """The quantised form of a Flax kernel `[in, out]`, computed on the host by numpy; its arrays are numpy arrays.

    Args:
        kernel: `[in, out]`, float32 or a 16-bit float.
        data_type: "nf4" or "fp4" (`quantize_four_bit`), or "int8" (`quantize_int8`), which has neither blocks nor scales
            to quantise again.
        block_size: weights per absmax, one of `BLOCK_SIZES`.
        double_quantization: whether to hold each absmax in 8 bits as well.

    Raises:
        InputError: the kernel is no matrix, empty, not of these dtypes or not finite; an unknown data type or block size.
    """
    if data_type not in DATA_TYPES:
        raise InputError(
            f"data type '{data_type}' is not one of {', '.join(DATA_TYPES)}{did_you_mean(data_type, DATA_TYPES)}"
        )
    if kernel.ndim != 2 or kernel.size == 0:
        raise InputError(f"{data_type} stores kernels [in, out]; got an array of shape {list(kernel.shape)}")
    if kernel.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise InputError(f"{data_type} stores kernels of float32, bfloat16 or float16; got {kernel.dtype}")
    kernel = np.asarray(kernel)
    if data_type == "int8":
        return quantize_int8(kernel)
    return quantize_four_bit(
        kernel, data_type=data_type, block_size=block_size, double_quantization=double_quantization
    )


def quantized_shape(shape: tuple[int, int], quantization: Quantization) -> QuantizedTensor:
    """What `quantize` makes of a kernel `[in, out]` of this `shape`, with a `jax.ShapeDtypeStruct` for each array."""
    size, (d_in, d_out) = math.prod(shape), shape
    if quantization.data_type == "int8":
        return Int8Tensor(_array((d_in, d_out), jnp.int8), _array((d_out,), jnp.float32))
    num_blocks = -(-size // quantization.block_size)
    absmax: Any = _array((num_blocks,), jnp.float32)
    if quantization.double_quantization:
        nested = _array((-(-num_blocks // NESTED_BLOCK_SIZE),), jnp.float32)
        absmax = QuantizedAbsmax(_array((num_blocks,), jnp.uint8), nested, _array((), jnp.float32))
    codes = _array((-(-size // 2),), jnp.uint8)
    return FourBitTensor(codes, absmax, shape, quantization.block_size, quantization.data_type)


def _array(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(tensor: QuantizedTensor, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The Flax kernel `[in, out]` in `dtype` that `tensor` stands for; pure, for use inside a jitted step.

    Products are float32, cast last. The result is as large as the full kernel: use it in a `recomputed` layer, else the
    backward pass keeps every dequantised kernel alive.
    """
    if isinstance(tensor, Int8Tensor):
        return dequantize_int8(tensor, dtype)
    return dequantize_four_bit(tensor, dtype)


def quantize_like(tensor: QuantizedTensor, kernel: jax.Array | np.ndarray) -> QuantizedTensor:
    """`kernel: [in, out]` in the scheme that `tensor` is stored in, on the device."""
    return jax.device_put(quantize(np.asarray(kernel), **dataclasses.asdict(Quantization.of(tensor))))
