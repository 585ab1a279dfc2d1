"""Kernels of any shape in 4 and 8 bits: sizes, the largest error a block can have, and a second rounding that changes nothing."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.quantization import BLOCK_SIZES, Quantization, dequantize, quantize, quantized_shape
from jaxpeft.quantization.double_quantization import dequantize_absmax, quantize_absmax
from jaxpeft.quantization.fp4 import FP4
from jaxpeft.quantization.nf4 import NF4

CODEBOOKS = {"nf4": NF4.codebook, "fp4": FP4.codebook}

SHAPES = st.tuples(st.integers(1, 33), st.integers(1, 33))
FOUR_BIT = st.sampled_from(sorted(CODEBOOKS))
SCALES = st.sampled_from([1e-6, 0.02, 1.0, 1e6])
SCHEMES = st.one_of(
    st.just(Quantization("int8")),
    st.builds(Quantization, FOUR_BIT, st.sampled_from(BLOCK_SIZES[:3]), st.booleans()),
)


def options(scheme):
    return {
        "data_type": scheme.data_type,
        "block_size": scheme.block_size,
        "double_quantization": scheme.double_quantization,
    }


@st.composite
def kernels(draw, shapes=SHAPES):
    values = np.random.default_rng(draw(st.integers(0, 10**6))).standard_normal(draw(shapes))
    return (values * draw(SCALES)).astype(np.float32)


def in_blocks(kernel, block_size):
    """The weights in torch's order, `[out, in]`, a block after the other; the last one may be short."""
    flat = np.asarray(kernel).T.reshape(-1)
    return [flat[start : start + block_size] for start in range(0, flat.size, block_size)]


@given(kernels(), SCHEMES)
def test_the_arrays_are_as_large_as_said_for_any_shape(kernel, scheme):
    tensor = quantize(kernel, **options(scheme))
    expected = quantized_shape(kernel.shape, scheme)
    assert jax.tree.structure(tensor) == jax.tree.structure(expected)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tensor)] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)
    ]
    assert str(Quantization.of(tensor)) == str(scheme)
    if scheme.data_type != "int8":
        assert tensor.codes.size == -(-kernel.size // 2)


@given(kernels(), FOUR_BIT)
def test_no_weight_is_further_off_than_half_the_widest_gap_of_its_block(kernel, data_type):
    """The gaps are those between the values of the data type, times the block's largest weight."""
    back = dequantize(quantize(kernel, data_type=data_type, double_quantization=False))
    gap = np.diff(np.sort(CODEBOOKS[data_type].values)).max()
    for block, found in zip(in_blocks(kernel, 64), in_blocks(back, 64), strict=True):
        largest = np.abs(block).max()
        assert np.abs(block - found).max() <= (gap / 2 + 1e-6) * largest
        # The largest weight itself is kept, as -1 or 1 times itself.
        assert np.abs(found).max() == largest


@given(kernels())
def test_int8_is_off_by_half_a_step_of_its_channel_at_most(kernel):
    tensor = quantize(kernel, data_type="int8")
    back = np.asarray(dequantize(tensor))
    step = np.abs(kernel).max(axis=0) / 127
    assert (np.abs(kernel - back) <= step * (0.5 + 1e-3)).all()
    assert np.abs(tensor.values.astype(np.int32)).max() == 127


@given(kernels(), SCHEMES.filter(lambda scheme: scheme.data_type == "int8" or not scheme.double_quantization))
def test_what_was_rounded_once_is_rounded_to_the_same_codes(kernel, scheme):
    tensor = quantize(kernel, **options(scheme))
    again = quantize(np.asarray(dequantize(tensor)), **options(scheme))
    if scheme.data_type == "fp4":  # of its two zeros a negative weight takes the second, and 0 the first
        np.testing.assert_array_equal(dequantize(again), dequantize(tensor))
    elif scheme.data_type == "nf4":
        np.testing.assert_array_equal(again.codes, tensor.codes)
    else:
        np.testing.assert_array_equal(again.values, tensor.values)


@given(st.sampled_from([1, 255, 256, 257, 700]), st.integers(0, 10**6), SCALES)
def test_maxima_in_8_bits_are_off_by_a_small_share_of_their_spread(size, seed, scale):
    """Half the widest gap of the dynamic map is 0.7 % of the largest distance from the mean, in each 256."""
    absmax = (np.random.default_rng(seed).random(size) * scale).astype(np.float32)
    stored = quantize_absmax(absmax)
    back = np.asarray(dequantize_absmax(stored))
    assert back.shape == absmax.shape
    for start in range(0, size, 256):
        part = slice(start, start + 256)
        spread = np.abs(absmax[part] - stored.offset).max()
        assert np.abs(back[part] - absmax[part]).max() <= 0.0071 * spread + 1e-6 * scale


@settings(max_examples=50)
@given(st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=20), FOUR_BIT)
def test_a_code_is_that_of_the_nearest_value(numbers, data_type):
    numbers = np.asarray(numbers, np.float32)
    values = CODEBOOKS[data_type].values
    distance = np.abs(values[CODEBOOKS[data_type].nearest_codes(numbers)].astype(np.float64) - numbers)
    nearest = np.abs(values[None].astype(np.float64) - numbers[:, None]).min(axis=1)
    np.testing.assert_allclose(distance, nearest, rtol=0, atol=1e-7)  # the middle of two values is rounded to float32
