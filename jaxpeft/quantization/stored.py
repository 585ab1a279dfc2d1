"""What every quantised kernel says of itself, whatever it is stored in."""

from __future__ import annotations

import math

import jax


class StoredKernel:
    """Base of the pytrees that stand for a Flax kernel `[in, out]`; they have its `shape`."""

    shape: tuple[int, int]

    @property
    def ndim(self) -> int:
        """Axes of the kernel: 2."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays held, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits held per weight: in 4 bits 4.5 with blocks of 64, 4.127 with double quantisation; in int8 8 and 32 / in."""
        return 8 * self.size_bytes / self.size
