"""Double quantisation: block maxima in 8 bits instead of 32 (QLoRA, Dettmers et al. 2023, section 3).

    absmax ≈ dynamic_map[code] * nested_absmax + offset     offset = mean(absmax), one nested_absmax per 256 of them

Maxima are positive. Their mean is subtracted first, so that a signed code uses all of its range. With blocks of 64
weights the overhead falls from 32/64 = 0.5 to 8/64 + 32/(64 * 256) = 0.127 bits per weight. The 8 bits are those of the
dynamic data type (`dynamic_map.py`), as in bitsandbytes; the paper has FP8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.quantization.dynamic_map import create_dynamic_map

NESTED_BLOCK_SIZE = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedAbsmax:
    """The blocks' maxima in the 8-bit dynamic data type; a pytree of three arrays.

    Attributes:
        codes: uint8 `[num_blocks]`, indices into `create_dynamic_map()`.
        nested_absmax: float32 `[ceil(num_blocks / 256)]`, the largest |absmax - offset| of each 256.
        offset: float32 `[]`, subtracted from every absmax.
    """

    codes: jax.Array | np.ndarray
    nested_absmax: jax.Array | np.ndarray
    offset: jax.Array | np.ndarray


def quantize_absmax(absmax: np.ndarray, *, offset: np.float32 | None = None) -> QuantizedAbsmax:
    """Store float32 `absmax: [num_blocks]` in 8 bits each, on the host.

    If `offset` is None, it is the mean of `absmax`. bitsandbytes sums that mean in another order, so its last bits may
    differ. Pass bitsandbytes' own offset to reproduce its `nested_absmax` exactly.
    """
    if offset is None:
        offset = np.float32(absmax.mean(dtype=np.float64))
    num_nested_blocks = -(-absmax.size // NESTED_BLOCK_SIZE)
    blocks = np.zeros((num_nested_blocks, NESTED_BLOCK_SIZE), np.float32)  # zeros do not raise a short block's maximum
    blocks.reshape(-1)[: absmax.size] = absmax - offset
    nested_absmax = np.abs(blocks).max(axis=1)
    # A block of equal maxima has nested_absmax 0: every code is then the code of 0, not of 0/0.
    normalised = blocks / np.where(nested_absmax > 0, nested_absmax, np.float32(1))[:, None]
    table = create_dynamic_map()
    codes = np.searchsorted((table[:-1] + table[1:]) / 2, normalised.reshape(-1)[: absmax.size])
    return QuantizedAbsmax(codes.astype(np.uint8), nested_absmax, np.asarray(offset, np.float32))


def quantized_absmax_shape(num_blocks: int) -> QuantizedAbsmax:
    """The result of `quantize_absmax` for `num_blocks` maxima, with a `jax.ShapeDtypeStruct` for each array."""
    num_nested_blocks = -(-num_blocks // NESTED_BLOCK_SIZE)
    shapes: Any = {
        "codes": jax.ShapeDtypeStruct((num_blocks,), jnp.uint8),
        "nested_absmax": jax.ShapeDtypeStruct((num_nested_blocks,), jnp.float32),
        "offset": jax.ShapeDtypeStruct((), jnp.float32),
    }
    return QuantizedAbsmax(**shapes)


def dequantize_absmax(quantized: QuantizedAbsmax) -> jax.Array:
    """The float32 maxima `[num_blocks]` that `quantized` stands for; pure, for use inside jit."""
    # Scale the map for each nested block first, and gather last. XLA would fuse a trailing product into the reader of the
    # result, and on a CPU repeat it for every byte of the kernel (measured: 5.0 ms instead of 1.6 for a kernel
    # [768, 3072] in bfloat16).
    maps = jnp.asarray(create_dynamic_map()) * jnp.asarray(quantized.nested_absmax)[:, None] + quantized.offset
    codes = jnp.asarray(quantized.codes)
    nested_blocks = jnp.arange(codes.size) // NESTED_BLOCK_SIZE
    return maps.at[nested_blocks, codes].get(mode="promise_in_bounds")
