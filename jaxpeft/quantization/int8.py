"""int8 with one scale per output channel, as bitsandbytes stores a linear layer (Dettmers et al. 2022, LLM.int8(), section 2).

    weight ≈ value * absmax / 127        value = round(127 * weight / absmax), absmax = max |weight| of its output channel

Only the storage is LLM.int8()'s: activations stay floats and are multiplied with the dequantised kernel, where
bitsandbytes rounds them to int8 too.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.quantization.stored import StoredKernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Tensor(StoredKernel):
    """A Flax kernel `[in, out]` in int8: a pytree of its arrays.

    Attributes:
        values: int8 `[in, out]`, from -127 to 127.
        absmax: float32 `[out]`, the largest |weight| of each output channel.
    """

    values: jax.Array | np.ndarray
    absmax: jax.Array | np.ndarray

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        """`(in, out)`, the Flax kernel's."""
        d_in, d_out = self.values.shape
        return d_in, d_out


def quantize_int8(kernel: np.ndarray) -> Int8Tensor:
    """The int8 form of a Flax kernel `[in, out]`, computed on the host; its arrays are numpy arrays.

    Equals `bitsandbytes.functional.int8_vectorwise_quant` of torch's `[out, in]` bit for bit, ties to even included. A
    channel of zeros has absmax 0 and values 0.

    Raises:
        InputError: weights that are not finite.
    """
    kernel = kernel.astype(np.float32, copy=False)
    absmax = np.abs(kernel).max(axis=0)
    if not np.isfinite(absmax).all():
        raise InputError("cannot quantise a kernel that holds NaN or infinite weights")
    # Torch computes 127 / absmax as 127 * (1 / absmax): one division would round 1 weight in a million the other way.
    # Where that overflows, in a channel with no weight above 4e-37, the values are 0.
    usable = absmax > np.float32(128) / np.finfo(np.float32).max
    reciprocals = np.float32(1) / np.where(usable, absmax, np.float32(1))
    scales = np.where(usable, reciprocals * np.float32(127), np.float32(0))
    return Int8Tensor(np.rint(kernel * scales).astype(np.int8), absmax)


def dequantize_int8(tensor: Int8Tensor, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The Flax kernel `[in, out]` in `dtype` that `tensor` stands for. Products are float32, cast last."""
    scales = jnp.asarray(tensor.absmax) * np.float32(1 / 127)
    return (jnp.asarray(tensor.values).astype(jnp.float32) * scales).astype(dtype)
