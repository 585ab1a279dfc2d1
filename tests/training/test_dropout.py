"""The draws of dropout: jax's own numbers, however they are computed."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxpeft.training.dropout import GENERATORS, dropout_key, for_drawing, threefry2x32

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_written_out_threefry_draws_what_jax_draws(shape):
    """The same bits, and with them the same dropout, for any shape."""
    key = dropout_key(3)
    assert key.dtype != for_drawing(key).dtype
    chex.assert_trees_all_equal(jax.random.bits(for_drawing(key), shape), jax.random.bits(key, shape))
    draw = jax.jit(lambda key: jax.random.bernoulli(key, 0.9, shape))
    chex.assert_trees_all_equal(draw(for_drawing(key)), draw(key))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
def test_every_width_of_bits_is_jax_s_own(dtype):
    """Dropout asks for 32 bits; whoever asks for others gets jax's, too."""
    key = dropout_key(0)
    chex.assert_trees_all_equal(jax.random.bits(for_drawing(key), (9,), dtype), jax.random.bits(key, (9,), dtype))


def test_without_partitionable_threefry_the_bits_are_jax_s_own():
    """jax's older order of counters is a setting; it is asked for, not copied."""
    key = dropout_key(0)
    with jax.threefry_partitionable(False):
        chex.assert_trees_all_equal(jax.random.bits(for_drawing(key), (4, 3)), jax.random.bits(key, (4, 3)))


def test_keys_are_folded_and_split_as_jax_s_own():
    """Flax folds a key for every layer, and vmap maps over keys."""
    key = dropout_key(1)
    ours, own = for_drawing(key), key
    data = jax.random.key_data
    chex.assert_trees_all_equal(data(jax.random.fold_in(ours, 5)), data(jax.random.fold_in(own, 5)))
    chex.assert_trees_all_equal(data(jax.random.split(ours, (2, 3))), data(jax.random.split(own, (2, 3))))
    many = jax.vmap(lambda key: jax.random.bits(key, (4,)))
    chex.assert_trees_all_equal(many(jax.random.split(ours, 3)), many(jax.random.split(own, 3)))


def test_flax_drops_out_the_same_entries():
    """`nn.Dropout`, whose draws are transformers' own."""
    module, x, key = nn.Dropout(0.3, deterministic=False), jnp.ones((16, 32)), dropout_key(2)
    chex.assert_trees_all_equal(
        module.apply({}, x, rngs={"dropout": for_drawing(key)}), module.apply({}, x, rngs={"dropout": key})
    )


def test_another_generator_is_left_alone():
    """An accelerator's `rbg` is its own instruction."""
    key = jax.random.key(0, impl=GENERATORS[1])
    assert for_drawing(key) is key


def test_block_is_the_paper_s():
    """Known answers of Random123 (its `kat_vectors`): counter and key of zeros, and of ones."""
    zero, ones = jnp.uint32(0), jnp.uint32(0xFFFFFFFF)
    assert [hex(int(word)) for word in threefry2x32(zero, zero, zero, zero)] == ["0x6b200159", "0x99ba4efe"]
    assert [hex(int(word)) for word in threefry2x32(ones, ones, ones, ones)] == ["0x1cb996fc", "0xbb002be7"]


def test_a_cpu_s_program_has_no_loop_in_its_draws():
    """What makes it fast: jax's own lowering for the CPU loops over groups of rounds."""
    draw = jax.jit(lambda key: jax.random.bernoulli(key, 0.9, (64, 64)))
    assert "while" in draw.lower(dropout_key(0)).as_text()
    assert "while" not in draw.lower(for_drawing(dropout_key(0))).as_text()
