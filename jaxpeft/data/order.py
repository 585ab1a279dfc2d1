"""The order of rows as a pure function of (seed, epoch): a resumed run sees what an unbroken one would have seen."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# Independent streams of one run's seed: default_rng([seed, stream, number]).
ORDER_STREAM = 0
MASK_STREAM = 1
SHAPE_STREAM = 2
FILL = -1  # stands for "no row" in a batch; its weight is 0


def num_batches(num_rows: int, batch_size: int) -> int:
    """The batches that `num_rows` rows fill, the last one perhaps in part."""
    return -(-num_rows // batch_size)


def cut(rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows `[n]` int cut into batches `[ceil(n / batch_size), batch_size]`, the last one filled up with `FILL`."""
    batches = np.full((num_batches(len(rows), batch_size), batch_size), FILL, np.int64)
    batches.flat[: len(rows)] = rows
    return batches


def order_rng(seed: int, epoch: int) -> np.random.Generator:
    """The generator of one epoch's order."""
    return np.random.default_rng([seed, ORDER_STREAM, epoch])


def shape_rng(epoch: int) -> np.random.Generator:
    """The generator of the order in which an epoch's shapes of batches come: the same for all seeds.

    So the batches of two runs that differ in their seed have the same shapes, and the two can train in one program.
    """
    return np.random.default_rng([SHAPE_STREAM, epoch])


# A handful of epochs: train_batch asks for the same one at every step.
@lru_cache(maxsize=4)
def epoch_order(num_rows: int, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """One epoch's batches of rows, `[steps, batch_size]` int, read-only: each row once, the last batch filled up."""
    batches = cut(order_rng(seed, epoch).permutation(num_rows), batch_size)
    batches.flags.writeable = False
    return batches
