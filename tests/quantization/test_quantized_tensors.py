"""Every kind of quantised tensor as a pytree under jax's transformations, in a recomputed layer, and what is refused."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft.quantization
from jaxpeft.config import ModelConfig
from jaxpeft.errors import InputError
from jaxpeft.quantization import (
    NUMBER_FORMATS,
    NumberFormat,
    Quantization,
    QuantizedTensor,
    dequantize,
    is_quantized,
    quantize,
    quantize_like,
    quantized_shape,
    recomputed,
)
from jaxpeft.quantization.recompute import _held_back

SCHEMES = {
    "nf4": {"double_quantization": False},
    "nf4-double": {},
    "fp4-256": {"data_type": "fp4", "block_size": 256, "double_quantization": False},
    "fp4-double": {"data_type": "fp4"},
    "int8": {"data_type": "int8"},
}


def normal(*shape, seed=0, scale=0.02):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@pytest.fixture(params=SCHEMES.values(), ids=SCHEMES, name="scheme")
def _scheme(request):
    return request.param


@pytest.mark.parametrize("shape", [(64, 48), (13, 11)])
def test_dequantize_inside_jit_equals_outside(shape, scheme):
    tensor = quantize(normal(*shape), **scheme)
    outside = dequantize(tensor)
    chex.assert_shape(outside, shape)
    np.testing.assert_array_equal(jax.jit(lambda t: dequantize(t))(tensor), outside)
    x = np.eye(shape[0], dtype=np.float32)
    np.testing.assert_allclose(jax.jit(lambda x, t: x @ dequantize(t))(x, tensor), outside, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dequantize_rounds_the_float32_product_once(dtype, scheme):
    tensor = quantize(normal(64, 64), **scheme)
    half = dequantize(tensor, dtype)
    chex.assert_type(half, dtype)
    np.testing.assert_array_equal(half, dequantize(tensor).astype(dtype))


def test_passes_through_jax_transformations(scheme):
    tensor = quantize(normal(64, 48), **scheme)
    chex.assert_trees_all_equal(jax.jit(lambda t: t)(tensor), tensor)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf, tensor), tensor)
    on_device = jax.device_put({"layer": {"kernel": tensor}}, jax.devices()[0])["layer"]["kernel"]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(on_device))
    assert (on_device.shape, on_device.ndim, on_device.size) == ((64, 48), 2, 64 * 48)
    assert on_device.size_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(tensor))
    assert Quantization.of(on_device) == Quantization.of(tensor)
    abstract = jax.eval_shape(lambda t: t, tensor)
    assert abstract.bits_per_weight == tensor.bits_per_weight
    assert jax.eval_shape(dequantize, tensor).shape == (64, 48)
    assert [is_quantized(leaf) for leaf in (tensor, abstract, jnp.ones((2, 2)))] == [True, True, False]


def test_one_trace_for_equal_shapes(scheme):
    chex.clear_trace_counter()  # it counts by the function's code, which all schemes share
    traced = jax.jit(chex.assert_max_traces(lambda t: dequantize(t), n=1))
    for seed in range(3):
        traced(quantize(normal(64, 48, seed=seed), **scheme))


def test_strict_dtype_promotion(scheme):
    with jax.numpy_dtype_promotion("strict"):
        kernel = jax.jit(lambda t: dequantize(t, jnp.bfloat16))(quantize(normal(64, 49), **scheme))
    assert (kernel.dtype, kernel.shape) == (jnp.bfloat16, (64, 49))


def test_gradient_flows_past_the_frozen_kernel(scheme):
    tensor = quantize(normal(64, 48), **scheme)
    gradient = jax.jit(jax.grad(lambda x, t: (x @ dequantize(t)).sum()))(jnp.ones((2, 64)), tensor)
    expected = np.broadcast_to(np.asarray(dequantize(tensor)).sum(1), (2, 64))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_a_recomputed_layer_is_the_layer(scheme):
    tensor, x = quantize(normal(64, 48), **scheme), jnp.asarray(normal(3, 64, scale=1))

    def layer(tensor, key, x):
        return x @ dequantize(tensor)

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda x: jnp.square(run(tensor, None, x)).sum()))(x)

    chex.assert_trees_all_close(loss(recomputed(layer)), loss(layer), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float32", "bfloat16"])
def test_what_is_held_back_keeps_its_bits(dtype):
    """A number format may store its weights as floats: -0 stays -0."""
    stored = jnp.asarray([0, 1, 255] if dtype == "uint8" else [-0.0, -1, 3], dtype)
    held = jax.jit(_held_back)(jnp.ones((2, 2)), stored)
    assert np.asarray(held).tobytes() == np.asarray(stored).tobytes()


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("data_type", NUMBER_FORMATS)
def test_a_compiled_tower_never_holds_its_kernels_in_full(data_type):
    """XLA's own account of eight kernels, 0.52 MB in fp32: forward and backward, one is there at a time."""
    kernels = [quantize(normal(128, 128, seed=i), data_type=data_type) for i in range(8)]

    @recomputed
    def layer(tensor, key, x):
        return jnp.tanh(x @ dequantize(tensor))

    def loss(x, kernels):
        for tensor in kernels:
            x = layer(tensor, None, x)
        return x.sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((2, 128)), kernels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < sum(4 * tensor.size for tensor in kernels) / 3


@pytest.mark.parametrize("data_type", NUMBER_FORMATS)
def test_16_bit_kernels_are_quantized_as_their_float32_values(data_type):
    kernel = jnp.asarray(normal(64, 48), jnp.bfloat16)
    single = np.asarray(kernel.astype(jnp.float32))
    chex.assert_trees_all_equal(quantize(kernel, data_type=data_type), quantize(single, data_type=data_type))


def test_a_shape_is_the_shape_of_the_result(scheme):
    for shape in ((64, 48), (13, 11), (768, 30)):
        tensor = quantize(normal(*shape), **scheme)
        expected = quantized_shape(shape, Quantization.of(tensor))
        assert jax.eval_shape(lambda t: t, tensor) == expected
        assert expected.size_bytes == tensor.size_bytes


def test_quantize_like_keeps_the_scheme(scheme):
    tensor, kernel = quantize(normal(64, 48), **scheme), normal(64, 48, seed=1)
    again = quantize_like(tensor, kernel)
    chex.assert_trees_all_equal(again, quantize(kernel, **scheme))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(again))


def test_schemes_are_said_in_words():
    assert str(Quantization()) == "nf4 in blocks of 64 with double quantisation"
    assert str(Quantization("fp4", 128, False)) == "fp4 in blocks of 128 without double quantisation"
    assert str(Quantization("int8", 128, False)) == str(Quantization("int8")) == "int8"


@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [0, 32, 63, 65, 96, 8192])
def test_refuses_a_block_size_that_bitsandbytes_does_not_have(block_size, data_type):
    with pytest.raises(InputError, match=f"{data_type} block size {block_size} is not one of 64, 128"):
        quantize(normal(64, 4), data_type=data_type, block_size=block_size)


@pytest.mark.parametrize("name", NUMBER_FORMATS)
def test_a_format_says_what_a_model_card_needs(name):
    number_format = NUMBER_FORMATS[name]
    assert isinstance(number_format, NumberFormat)
    assert (number_format.name, number_format.title.lower()) == (name, name)
    assert "arXiv" in number_format.citation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SignTensor(QuantizedTensor):
    """Another way to store a kernel: the signs of its weights, and their mean size."""

    signs: jax.Array | np.ndarray
    scale: jax.Array | np.ndarray

    @property
    def shape(self):
        return self.signs.shape

    def scheme(self):
        return Quantization("sign")

    def dequantize(self, dtype):
        return (self.signs.astype(jnp.float32) * self.scale).astype(dtype)


class Sign(NumberFormat):
    name, title, citation = "sign", "sign", "nobody"

    def quantize(self, kernel, *, block_size, double_quantization):
        return SignTensor(np.sign(kernel).astype(np.int8), np.abs(kernel).mean())

    def shape_of(self, shape, quantization):
        return SignTensor(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct((), jnp.float32))


SIGN = Sign()


def test_another_format_is_one_line_in_the_table(monkeypatch):
    with pytest.raises(InputError, match="no number format 'sign'"):
        ModelConfig(quantization="sign")
    monkeypatch.setitem(NUMBER_FORMATS._places, "sign", f"{__name__}:SIGN")
    kernel = normal(64, 48)
    tensor = quantize(kernel, data_type=ModelConfig(quantization="sign").quantization)
    assert is_quantized(tensor)
    assert (str(Quantization.of(tensor)), tensor.size) == ("sign", 64 * 48)
    assert quantized_shape((64, 48), Quantization("sign")) == jax.eval_shape(lambda t: t, tensor)
    expected = np.sign(kernel) * np.abs(kernel).mean()
    np.testing.assert_allclose(dequantize(tensor), expected, rtol=1e-6)
    np.testing.assert_array_equal(dequantize(quantize_like(tensor, -kernel)), -dequantize(tensor))
    x = jnp.asarray(normal(3, 64))
    layer = recomputed(lambda tensor, key, x: x @ dequantize(tensor))
    np.testing.assert_allclose(jax.jit(lambda x: layer(tensor, None, x))(x), x @ expected, rtol=1e-4, atol=1e-5)


def test_the_room_has_no_other_names():
    with pytest.raises(AttributeError, match=r"module 'jaxpeft\.quantization' has no attribute 'absent'"):
        _ = jaxpeft.quantization.absent


def test_refuses_an_unknown_data_type():
    with pytest.raises(InputError, match=r"no number format 'nf8'; did you mean 'nf4'\?"):
        quantize(normal(64, 4), data_type="nf8")


@pytest.mark.parametrize("data_type", NUMBER_FORMATS)
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.zeros((2, 3, 4), np.float32), r"kernels \[in, out\]; got an array of shape \[2, 3, 4\]"),
        (np.zeros((0, 4), np.float32), r"shape \[0, 4\]"),
        (np.zeros((4, 4), np.int32), "got int32"),
        (np.zeros((4, 4), np.float64), "got float64"),
        (np.full((4, 4), math.nan, np.float32), "NaN or infinite"),
        (np.full((64, 4), math.inf, np.float32), "NaN or infinite"),
    ],
)
def test_refuses_what_is_no_finite_float_matrix(kernel, message, data_type):
    with pytest.raises(InputError, match=message) as caught:
        quantize(kernel, data_type=data_type)
    assert "\n" not in str(caught.value)


def test_runs_that_train_together_hold_one_base_back():
    """The base is not copied for each of them: what comes out has no axis of runs."""
    values, stored = jnp.arange(6.0).reshape(3, 2), jnp.arange(4, dtype=jnp.uint8)
    held = jax.vmap(_held_back, in_axes=(0, None), out_axes=None)(values, stored)
    np.testing.assert_array_equal(held, stored)
    assert held.dtype == stored.dtype
    each = jax.vmap(_held_back)(values, jnp.stack([stored, stored + 1, stored + 2]))
    np.testing.assert_array_equal(each, [stored, stored + 1, stored + 2])
