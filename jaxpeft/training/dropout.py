"""The random keys of dropout: a run's first key, threefry's bits as one fused expression, and the bits of some rows of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
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


@dataclass(frozen=True)
class PassRows:
    """The rows of a batch that one pass computes: on every device the next `in_pass` of its `in_batch` rows.

    Attributes:
        in_pass: rows of a pass on each device.
        in_batch: rows of the whole batch on each device.
        devices: number of devices that share the batch.
    """

    in_pass: int
    in_batch: int
    devices: int = 1

    def key_of(self, key: jax.Array, number: jax.Array) -> jax.Array:
        """The key of pass `number`, which counts from 0. It draws as `for_drawing(key)`, until `row_key` is called on it.

        Only threefry can draw a part of an array. A key of another generator becomes one of threefry.
        """
        words = jax.random.key_data(key)
        return jax.random.wrap_key_data(jnp.stack([*words[:2], jnp.asarray(number, jnp.uint32)]), impl=_IN_PASS)

    def row_key(self, key: jax.Array) -> jax.Array:
        """A key that draws for the rows of the pass what `for_drawing` draws for them in the whole batch.

        It does so for arrays of two or more axes whose first axis is the rows of the pass. Other arrays it draws as before.
        `key` is from `key_of`, or folded from such a key.
        """
        return jax.random.wrap_key_data(jax.random.key_data(key), impl=_impl_for(self))

    def rows(self, number: jax.Array) -> jax.Array:
        """The rows of pass `number` in the whole batch, uint32 `[devices · in_pass]`."""
        place = jnp.arange(self.devices * self.in_pass, dtype=jnp.uint32)
        device = place // jnp.uint32(self.in_pass)
        return place + device * jnp.uint32(self.in_batch - self.in_pass) + number * jnp.uint32(self.in_pass)


def _bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    """As `jax.random.bits`, for a `width` of 8 to 64. Dropout uses 32."""
    if not _is_usual(width, shape):
        return jax.random.bits(_jax_key(key), shape, jnp.dtype(f"uint{width}"))
    return _counted(key, shape)


def _is_usual(width: int, shape: tuple[int, ...]) -> bool:
    """True for 32 bits, jax's partitionable layout, and a counter that fits into one word. Only this case is unrolled."""
    return width == 32 and jax.config.values["jax_threefry_partitionable"] and 0 < math.prod(shape) < 2**32


def _counted(key: jax.Array, shape: tuple[int, ...], rows: jax.Array | None = None) -> jax.Array:
    """The 32 bits of each entry of an array of `shape` or, with `rows`, of its rows in a larger array."""
    # The counter is an entry's index, in two words. It is a sum of iotas of each axis, because XLA can split those over devices.
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    low = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        if rows is not None and axis == 0:
            index = rows.reshape(-1, *[1] * (len(shape) - 1))
        low += jnp.uint32(stride) * index
    first, second = threefry2x32(key[0], key[1], jnp.zeros(shape, jnp.uint32), low)
    return first ^ second


def _bits_in_pass(key: jax.Array, width: int, shape: tuple[int, ...], rows: PassRows | None = None) -> jax.Array:
    """As `_bits`, with a key of three words; with `rows`, the bits of the rows of the pass whose number is the third word."""
    if rows is None or len(shape) < 2 or shape[0] != rows.devices * rows.in_pass:
        return _bits(key[:2], width, shape)
    whole = (rows.devices * rows.in_batch, *shape[1:])
    if not _is_usual(width, whole):
        return _bits(key[:2], width, whole)[rows.rows(key[2])]
    return _counted(key[:2], shape, rows.rows(key[2]))


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


def _folded_in_pass(words: jax.Array, data: Any) -> jax.Array:
    return jnp.concatenate([_folded(words[:2], data), words[2:]])


def _split(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.key_data(jax.random.split(_jax_key(words), shape))


def _split_in_pass(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.concatenate([_split(words[:2], shape), jnp.broadcast_to(words[2:], (*shape, 1))], axis=-1)


def _seeded(seed: jax.Array) -> jax.Array:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _seeded_in_pass(seed: jax.Array) -> jax.Array:
    return jnp.concatenate([_seeded(seed), jnp.zeros(1, jnp.uint32)])


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


@lru_cache
def _impl_for(rows: PassRows | None) -> Any:
    """The implementation of keys in a pass. Their third word is the number of the pass."""
    return define_prng_impl(
        key_shape=(3,),
        seed=_seeded_in_pass,
        split=_split_in_pass,
        random_bits=partial(_bits_in_pass, rows=rows),
        fold_in=_folded_in_pass,
        name=f"threefry2x32 in a pass ({rows})",
        tag="fry_pass",
    )


_IN_PASS = _impl_for(None)
