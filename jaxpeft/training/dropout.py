"""What a run's dropout draws from: the key that it starts with, and threefry's bits in one piece."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl

GENERATORS = ("threefry2x32", "rbg")
"""jax's random generators that a run's dropout may draw from."""


def dropout_key(seed: int, *, platform: str = "cpu", num_devices: int = 1) -> jax.Array:
    """A run's key, of the generator that costs least on `num_devices` devices of `platform` ("cpu", "gpu", "tpu").

    One accelerator draws with `rbg`, its own instruction. XLA cannot split that one: of several devices each would draw the bits of
    the whole batch, which on 256 TPU chips multiplies a step's memory by sixteen; threefry it splits. A CPU has no such
    instruction: 2.41 s a step of DistilBERT (16 × 128) with rbg, and 2.25 s with jax's own threefry.
    """
    generator = "rbg" if platform != "cpu" and num_devices == 1 else "threefry2x32"
    return jax.random.fold_in(jax.random.key(seed, impl=generator), 1)


def for_drawing(key: jax.Array) -> jax.Array:
    """`key` as one that draws the same numbers faster, where there is such a way; it is for a compiled step, not for a checkpoint.

    On a CPU jax computes threefry's twenty rounds in a loop, which writes its state to memory four by four rounds and keeps XLA from
    fusing it with what the bits are for. Written out, as jax itself does on accelerators, they cost a step of DistilBERT
    (16 × 128, 2 cores) 6 to 7 % less.
    """
    if jax.random.key_impl(key) != "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_THREEFRY)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """As `jax.random.bits`, of `width` 8 to 64: dropout asks for 32."""
    if width != 32 or not jax.config.values["jax_threefry_partitionable"] or not 0 < math.prod(shape) < 2**32:
        return jax.random.bits(_jax_key(key), shape, jnp.dtype(f"uint{width}"))
    # The number of an entry is the counter, in two words; summed from iotas of each axis, which XLA splits over devices.
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
"""jax's `threefry2x32`, number for number."""
