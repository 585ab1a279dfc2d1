"""The order of rows, a pure function of (seed, epoch): a resumed run sees the same batches as an uninterrupted one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Independent streams of one run's seed: default_rng([seed, stream, number]).
ORDER_STREAM = 0
MASK_STREAM = 1
SHAPE_STREAM = 2
FILL = -1  # means "no row" in a batch; its weight is 0


def num_batches(num_rows: int, batch_size: int) -> int:
    """Number of batches for `num_rows` rows, including an incomplete last one."""
    return -(-num_rows // batch_size)


def cut(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Cut rows `[n]` int into batches `[ceil(n / batch_size), batch_size]`. The last one is padded with `FILL`."""
    batches = np.full((num_batches(len(rows), batch_size), batch_size), FILL, np.int64)
    batches.flat[: len(rows)] = rows
    return batches


def order_rng(seed: int, epoch: int) -> np.random.Generator:
    """The random generator for the order of the rows in one epoch."""
    return np.random.default_rng([seed, ORDER_STREAM, epoch])


def shape_rng(epoch: int) -> np.random.Generator:
    """The random generator for the order of an epoch's batch shapes, the same for all seeds.

    Runs that differ only in their seed thus have batches of the same shapes and can train in one program.
    """
    return np.random.default_rng([SHAPE_STREAM, epoch])


@lru_cache(maxsize=4)
def epoch_order(num_rows: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """One epoch's batches of rows, `[micro-steps, batch_size]` int, read-only: each row once, the last batch padded."""
    # Cached, because every micro-step of an epoch asks for the same order.
    batches = cut(order_rng(seed, epoch).permutation(num_rows), batch_size)
    batches.flags.writeable = False  # the cache returns this array to every caller
    return batches
