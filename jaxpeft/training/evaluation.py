"""Evaluation: run the jitted step on a whole data set, and sum the statistics on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxpeft.tasks.base import Batch, for_device
from jaxpeft.training.sharding import DataParallel
from jaxpeft.trees import Adapters, Layers, Params

EvalStep = Callable[..., tuple[dict, jax.Array | None]]
Gathered = Callable[[np.ndarray, Batch], tuple[np.ndarray, np.ndarray]]
"""`Task.gathered`."""

# Sums stay on the devices until the end of a data set. At most this many batches are queued, which is enough to keep
# a device busy. There must be a limit, because several CPU devices or processes deadlock if many more independent programs
# are queued (jax 0.10.2: about thirty in two processes).
_MAX_QUEUED = 8


class Evaluated(NamedTuple):
    """A data set after the evaluation step: the summed statistics and, if the task has outputs, what `Task.gathered` made of them."""

    sums: dict[str, float]
    outputs: np.ndarray | None
    labels: np.ndarray | None


def evaluate(
    step: EvalStep,
    parallel: DataParallel,
    frozen: Params,
    adapters: Adapters,
    masks: Layers,
    batches: Iterable[Batch],
    gathered: Gathered,
) -> Evaluated:
    """Run the evaluation step on `batches`. `gathered` is the task's own; its `measure` turns the result into metrics."""
    sums: list[dict[str, jax.Array]] = []
    outputs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in batches:
        statistics, out = step(frozen, adapters, masks, parallel.shard(for_device(batch)))
        sums.append(statistics)
        if out is not None:
            for kept, part in zip((outputs, labels), gathered(parallel.fetch(out), batch), strict=True):
                kept.append(part)
        elif len(sums) > _MAX_QUEUED:
            jax.block_until_ready(sums[-_MAX_QUEUED])
    joined = (np.concatenate(outputs), np.concatenate(labels)) if outputs else (None, None)
    return Evaluated(_total(sums), *joined)


def pseudo_perplexity(
    step: EvalStep, parallel: DataParallel, frozen: Params, adapters: Adapters, masks: Layers, batches: Iterable[Batch]
) -> float:
    """exp of the mean loss over tokens that are masked one at a time (Salazar et al. 2020, section 2.3). Not the perplexity."""
    sums: list[dict[str, jax.Array]] = []
    for batch in batches:
        sums.append(step(frozen, adapters, masks, parallel.shard(for_device(batch)))[0])
        if len(sums) > _MAX_QUEUED:
            jax.block_until_ready(sums[-_MAX_QUEUED])
    total = _total(sums)
    return math.exp(total["loss"] / total["weight"])


def _total(results: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    fetched = jax.device_get(list(results))
    # In double precision: an fp32 sum over a long data set would lose digits.
    return {key: float(np.sum([r[key] for r in fetched], dtype=np.float64)) for key in fetched[0]}
