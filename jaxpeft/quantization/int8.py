"""int8 with one scale per output channel, as bitsandbytes stores a linear layer (Dettmers et al. 2022, LLM.int8(), section 2).

    weight ≈ value * absmax / 127        value = round(127 * weight / absmax), absmax = max |weight| of its output channel

Only the storage is LLM.int8()'s. Activations stay floats and are multiplied with the dequantised kernel; bitsandbytes
rounds them to int8 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError
from jaxpeft.quantization.base import NumberFormat, Quantization, QuantizedTensor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Tensor(QuantizedTensor):
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

    def scheme(self) -> Quantization:
        """int8, which has no options."""
        return Quantization(INT8.name)

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The kernel `[in, out]` in `dtype`. Products are float32, cast last."""
        scales = jnp.asarray(self.absmax) * np.float32(1 / 127)
        return (jnp.asarray(self.values).astype(jnp.float32) * scales).astype(dtype)


class Int8(NumberFormat):
    """int8 with a scale per output channel; it has no blocks, so it ignores their options."""

    name = "int8"
    title = "int8"
    citation = "LLM.int8(): Dettmers et al. 2022, arXiv 2208.07339"

    def quantize(self, kernel: np.ndarray, *, block_size: int, double_quantization: bool) -> Int8Tensor:
        """Store `kernel: [in, out]` in int8, on the host.

        The result equals `bitsandbytes.functional.int8_vectorwise_quant` of torch's `[out, in]` bit for bit, ties to
        even included. A channel of zeros has absmax 0 and values 0.

        Raises:
            InputError: if weights are not finite.
        """
        kernel = kernel.astype(np.float32, copy=False)
        absmax = np.abs(kernel).max(axis=0)
        if not np.isfinite(absmax).all():
            raise InputError("cannot quantise a kernel that holds NaN or infinite weights")
        # Torch computes 127 / absmax as 127 * (1 / absmax); a plain division would round 1 weight in a million the other
        # way. If that overflows, in a channel with no weight above 4e-37, the values are 0.
        usable = absmax > np.float32(128) / np.finfo(np.float32).max
        reciprocals = np.float32(1) / np.where(usable, absmax, np.float32(1))
        scales = np.where(usable, reciprocals * np.float32(127), np.float32(0))
        return Int8Tensor(np.rint(kernel * scales).astype(np.int8), absmax)

    def shape_of(self, shape: tuple[int, int], quantization: Quantization) -> Int8Tensor:
        """The result of `quantize` for a kernel of `shape`, with a `jax.ShapeDtypeStruct` for each array."""
        values: Any = jax.ShapeDtypeStruct(shape, jnp.int8)
        absmax: Any = jax.ShapeDtypeStruct(shape[1:], jnp.float32)
        return Int8Tensor(values, absmax)


INT8 = Int8()
