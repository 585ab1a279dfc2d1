"""The 8-bit dynamic data type, in which double quantisation stores the block scales.

Each of the 256 values has a sign, a decimal exponent (`10**-6 … 10**0`) and a linear fraction. The larger the exponent,
the more bits the fraction gets. Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning" (2015,
section 2.2) and bitsandbytes' `functional.create_dynamic_map`, whose 256 float32 values are reproduced bit for bit.
"""

from __future__ import annotations

import functools

import numpy as np

_NUM_EXPONENTS = 7


def _linspace(num: int) -> np.ndarray:
    """`torch.linspace(0.1, 1, num)` in float32."""
    # numpy's own linspace differs in the last bit of some values. Torch goes from both ends with a fused multiply-add,
    # which rounds once; float64 rounded to float32 has the same result.
    start, stop = np.float32(0.1), np.float32(1.0)
    step = np.float64((stop - start) / np.float32(num - 1))
    index = np.arange(num)
    upwards = np.float64(start) + step * index
    downwards = np.float64(stop) - step * (num - 1 - index)
    return np.where(index < num // 2, upwards, downwards).astype(np.float32)


@functools.cache
def create_dynamic_map() -> np.ndarray:
    """The signed dynamic map, ascending: float32 `[256]`, from -0.99296875 to 1, with one exact 0. Read-only."""
    values = [0.0, 1.0]
    for exponent in range(_NUM_EXPONENTS):
        boundaries = _linspace(2**exponent + 1)
        means = (boundaries[:-1] + boundaries[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (exponent - _NUM_EXPONENTS + 1)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    table = np.sort(np.asarray(values, np.float32))
    table.flags.writeable = False  # cached: every caller gets this one array
    return table
