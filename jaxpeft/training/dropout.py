"""The random keys of dropout: a run's first key, and threefry's bits as one fused expression."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

GENERATORS = ("threefry2x32", "rbg")
"""jax's random generators that a run may use for dropout."""


def dropout_key(seed: int, *, platform: str = "cpu", num_devices: int = 1) -> jax.Array:
    """A run's key, with the cheapest generator for `num_devices` devices of `platform` ("cpu", "gpu", "tpu").

    A single accelerator uses `rbg`, which is an instruction of the hardware. XLA cannot split `rbg`: each of several
    devices would draw the bits of the whole batch, which on 256 TPU chips multiplies a step's memory by sixteen. XLA can
    split threefry. A CPU has no such instruction: a step of DistilBERT (16 × 128) takes 2.41 s with rbg and 2.25 s with
    jax's own threefry.
    """
    generator = "rbg" if platform != "cpu" and num_devices == 1 else "threefry2x32"
    return jax.random.fold_in(jax.random.key(seed, impl=generator), 1)


def for_drawing(key: jax.Array) -> jax.Array:
    """`key` with an implementation that draws the same numbers faster, if there is one. For a compiled step, not a checkpoint.

    On a CPU jax computes threefry's twenty rounds in a loop, which writes its state to memory every four rounds and keeps
    XLA from fusing the bits with their use. Here the rounds are unrolled, as in jax on accelerators: a step of DistilBERT
    (16 × 128, 2 cores) takes 6 to 7 % less time.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_THREEFRY)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """As `jax.random.bits`, for a `width` of 8 to 64. Dropout uses 32."""
    # Only the usual case is unrolled: 32 bits, jax's partitionable layout, and a counter that fits into one word.
    if width != 32 or not jax.config.values["jax_threefry_partitionable"] or not 0 < math.prod(shape) < 2**32:
        return jax.random.bits(_jax_key(key), shape, jnp.dtype(f"uint{width}"))
    # The counter is an entry's index, in two words. It is a sum of iotas of each axis, because XLA can split those over devices.
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    low = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        low += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    first, second = threefry2x32(key[0], key[1], jnp.zeros(shape, jnp.uint32), low)
    return first ^ second


def threefry2x32(key0: jax.Array, key1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Threefry-2x32 block of 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3)."""
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = x0 ^ (x1 << jnp.uint32(distance) | x1 >> jnp.uint32(32 - distance))
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _jax_key(words: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _folded(words: jax.Array, data: Any) -> jax.Array:
    return jax.random.key_data(jax.random.fold_in(_jax_key(words), data))


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.key_data(jax.random.split(_jax_key(words), shape))


def _seeded(seed: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


_THREEFRY = define_prng_impl(
    key_shape=(2,),
    seed=_seeded,
    split=_split,
    random_bits=_bits,
    fold_in=_folded,
    name="threefry2x32 written out",
    tag="fry_out",
)
"""jax's `threefry2x32`: the same numbers, bit for bit."""
