"""int8 against bitsandbytes on the CPU (live and stored)."""

import functools

import numpy as np
import pytest

from jaxpeft.quantization import dequantize, quantize


@functools.cache
def bitsandbytes_functional():
    pytest.importorskip("torch")
    return pytest.importorskip("bitsandbytes.functional")


def bitsandbytes_quantize(kernel):
    functional = bitsandbytes_functional()
    import torch

    values, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(np.array(kernel.T, order="C")))
    return values, absmax


def normal(*shape, seed=0, scale=0.02):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


KERNELS = {
    "768x3072": lambda: normal(768, 3072),
    "3x5": lambda: normal(3, 5),
    "one weight": lambda: normal(1, 1),
    "large": lambda: normal(128, 65, scale=1e37),
    # 127 in every column: each weight is its own value, and the halves are ties.
    "ties": lambda: np.concatenate([np.arange(-127, 127.5, 0.5), [127]]).astype(np.float32)[:, None].repeat(3, 1),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_values_and_absmax_equal_bitsandbytes_bit_for_bit(kernel):
    values, absmax = bitsandbytes_quantize(kernel())
    ours = quantize(kernel(), data_type="int8")
    np.testing.assert_array_equal(ours.values, values.numpy().T)
    np.testing.assert_array_equal(ours.absmax.view(np.uint32), absmax.numpy().view(np.uint32))


def test_dequantized_equals_bitsandbytes():
    kernel = normal(384, 1536)
    theirs = bitsandbytes_functional().int8_vectorwise_dequant(*bitsandbytes_quantize(kernel)).numpy().T
    np.testing.assert_allclose(dequantize(quantize(kernel, data_type="int8")), theirs, rtol=0, atol=5e-7)


# Made by bitsandbytes 0.50.2, torch 2.13.0+cpu: int8_vectorwise_quant(torch.from_numpy(golden_kernel().T.copy())), its
# first four input rows (a kernel's, so transposed), then int8_vectorwise_dequant.
GOLDEN_VALUES = bytes.fromhex(
    "e3ccba9fa7f3e5e9fc180b21449b97f6fd1c547feaec08387fecf7197687fc195bc90f14d5fe4181ff25c611"
)
GOLDEN_ABSMAX = [
    *(1.083984375, 1.123046875, 1.142578125, 0.966796875, 1.123046875, 1.2109375),
    *(0.859375, 0.869140625, 1.15234375, 0.966796875, 0.9765625),
]
GOLDEN_FIRST = [-0.24752399325370789, -0.45983022451400757, -0.6297674775123596, -0.7384196519851685]


def test_golden():
    n = np.arange(13 * 11, dtype=np.int64)
    kernel = (((n * n + 7 * n) % 251 - 125) * (1 + n % 5) / 512).astype(np.float32).reshape(13, 11)
    ours = quantize(kernel, data_type="int8")
    assert ours.values[:4].tobytes() == GOLDEN_VALUES
    assert ours.absmax.tolist() == GOLDEN_ABSMAX
    np.testing.assert_allclose(dequantize(ours)[0, :4], GOLDEN_FIRST, rtol=0, atol=5e-7)


def test_four_weights_by_hand():
    """Each column by its own maximum: 2 -> 127, -1 -> -63.5, a tie, to even -64; 0.5 -> 127, 0.1 -> 25.4, so 25."""
    ours = quantize(np.float32([[2, 0.5], [-1, 0.1]]), data_type="int8")
    assert ours.values.tolist() == [[127, 127], [-64, 25]]
    assert ours.absmax.tolist() == [2, 0.5]
    np.testing.assert_allclose(dequantize(ours), [[2, 0.5], [-2 * 64 / 127, 0.5 * 25 / 127]], rtol=1e-6)


@pytest.mark.parametrize("tiny", [0, 1e-45, 1e-38, 3e-37])
def test_a_channel_of_zeros_or_of_as_good_as_zeros_becomes_zero(tiny):
    kernel = normal(8, 3)
    kernel[:, 1] = tiny
    ours = quantize(kernel, data_type="int8")
    np.testing.assert_array_equal(np.asarray(dequantize(ours))[:, 1], 0)


def test_bits_per_weight_are_those_of_the_arrays_held():
    assert quantize(normal(768, 96), data_type="int8").bits_per_weight == 8 + 32 / 768
