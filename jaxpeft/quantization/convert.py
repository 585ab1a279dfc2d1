"""Kernels to quantised tensors and back, in whatever number format: the functions that the other rooms use."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.quantization import NUMBER_FORMATS
from jaxpeft.quantization.base import NumberFormat, Quantization, QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def is_quantized(leaf: Any) -> TypeIs[QuantizedTensor]:
    """True if `leaf` is a quantised kernel and not an array; usable as `is_leaf` of `jax.tree`'s functions."""
    return isinstance(leaf, QuantizedTensor)


def quantize(
    kernel: jax.Array | np.ndarray,
    *,
    data_type: str = "nf4",
    block_size: int = 64,
    double_quantization: bool = True,
) -> QuantizedTensor:
    """The quantised form of a Flax kernel `[in, out]`, computed on the host by numpy; its arrays are numpy arrays.

    >>> tensor = quantize(kernel, data_type="nf4")
    >>> kernel = dequantize(tensor, jnp.bfloat16)

    Args:
        kernel: `[in, out]`, float32 or a 16-bit float.
        data_type: a name in `NUMBER_FORMATS`: "nf4", "fp4" or "int8".
        block_size: weights per absmax, one of `BLOCK_SIZES`. int8 has no blocks and ignores it.
        double_quantization: True: hold each absmax in 8 bits as well. int8 ignores it.

    Raises:
        InputError: if the kernel is no matrix, empty, not finite or of another dtype, or if there is no such data type or
            block size.
    """
    number_format: NumberFormat = NUMBER_FORMATS[data_type]
    if kernel.ndim != 2 or kernel.size == 0:
        raise InputError(f"{data_type} stores kernels [in, out]; got an array of shape {list(kernel.shape)}")
    if kernel.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise InputError(f"{data_type} stores kernels of float32, bfloat16 or float16; got {kernel.dtype}")
    return number_format.quantize(np.asarray(kernel), block_size=block_size, double_quantization=double_quantization)


def quantized_shape(shape: tuple[int, int], quantization: Quantization) -> QuantizedTensor:
    """The result of `quantize` for a kernel of this `shape`, `(in, out)`, with a `jax.ShapeDtypeStruct` for each array."""
    number_format: NumberFormat = NUMBER_FORMATS[quantization.data_type]
    return number_format.shape_of(shape, quantization)


@functools.partial(jax.jit, static_argnames="dtype")
def dequantize(tensor: QuantizedTensor, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The Flax kernel `[in, out]` in `dtype` that `tensor` stands for; pure, for use inside a jitted step.

    Products are float32, cast last. The result is as large as the full kernel. Use it in a `recomputed` layer: elsewhere
    the backward pass keeps every dequantised kernel alive.
    """
    return tensor.dequantize(dtype)


def quantize_like(tensor: QuantizedTensor, kernel: jax.Array | np.ndarray) -> QuantizedTensor:
    """`kernel: [in, out]` stored in the scheme of `tensor`, on the device."""
    return jax.device_put(quantize(np.asarray(kernel), **dataclasses.asdict(tensor.scheme())))
