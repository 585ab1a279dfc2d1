"""Evaluation: run the jitted step on a whole data set, and sum the statistics on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import jax
import numpy as np

from jaxpeft.tasks.metrics import classification_metrics, masked_lm_metrics
from jaxpeft.training.objective import Batch
from jaxpeft.training.sharding import DataParallel
from jaxpeft.trees import Adapters, Layers, Params

EvalStep = Callable[..., tuple[dict, jax.Array]]


def evaluate_masked_lm(
    step: EvalStep, parallel: DataParallel, frozen: Params, adapters: Adapters, masks: Layers, batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean `loss` (nats), `perplexity` and `accuracy` over the masked tokens of `batches`."""
    return masked_lm_metrics(_total(_sums(step, parallel, frozen, adapters, masks, batches)))


def evaluate_classification(
    step: EvalStep,
    parallel: DataParallel,
    frozen: Params,
    adapters: Adapters,
    masks: Layers,
    batches: Iterable[Batch],
    names: Sequence[str],
) -> dict[str, float]:
    """Mean `loss` and the metrics `names` over the rows of `batches` whose weight is not 0."""
    sums, logits, labels = [], [], []
    for batch in batches:
        statistics, out = step(frozen, adapters, masks, parallel.shard(_device_part(batch)))
        real = np.asarray(batch["weights"]) > 0
        sums.append(statistics)
        logits.append(parallel.fetch(out)[real])
        labels.append(np.asarray(batch["labels"])[real])
    total = _total(sums)
    return classification_metrics(
        np.concatenate(logits), np.concatenate(labels), total["loss"] / total["weight"], names
    )


def predict_logits(
    step: EvalStep, parallel: DataParallel, frozen: Params, adapters: Adapters, masks: Layers, batches: Iterable[Batch]
) -> np.ndarray:
    """A classifier's logits `[rows, num_labels]` in the order of the data set's rows."""
    rows, logits = [], []
    for batch in batches:
        out = parallel.fetch(step(frozen, adapters, masks, parallel.shard(_device_part(batch)))[1])
        real = np.asarray(batch["rows"]) >= 0
        rows.append(np.asarray(batch["rows"])[real])
        logits.append(out[real])
    return np.concatenate(logits)[np.argsort(np.concatenate(rows))]  # batches are sorted by length


def pseudo_perplexity(
    step: EvalStep, parallel: DataParallel, frozen: Params, adapters: Adapters, masks: Layers, batches: Iterable[Batch]
) -> float:
    """exp of the mean loss over tokens that are masked one at a time (Salazar et al. 2020, section 2.3). Not the perplexity."""
    total = _total(_sums(step, parallel, frozen, adapters, masks, batches))
    return math.exp(total["loss"] / total["weight"])


def first(batches: Iterable[Batch], limit: int | None) -> Iterable[Batch]:
    """The first `limit` batches; None: all."""
    return islice(batches, limit)


def _sums(
    step: EvalStep, parallel: DataParallel, frozen: Params, adapters: Adapters, masks: Layers, batches: Iterable[Batch]
) -> list[dict[str, jax.Array]]:
    """The statistics of every batch. They stay on the device until the end, so the host waits once per data set."""
    sums: list[dict[str, jax.Array]] = []
    for batch in batches:
        sums.append(step(frozen, adapters, masks, parallel.shard(dict(batch)))[0])
        if len(sums) > _MAX_QUEUED:
            jax.block_until_ready(sums[-_MAX_QUEUED])
    return sums


# Enough to keep a device busy. Several CPU devices or processes deadlock if many more programs are queued that do not need
# each other's results (jax 0.10.2; some thirty in two processes).
_MAX_QUEUED = 8


def _device_part(batch: Batch) -> dict:
    # `rows` restores the order on the host; the step does not read it.
    return {key: value for key, value in batch.items() if key != "rows"}


def _total(results: Sequence[dict[str, jax.Array]]) -> dict[str, float]:
    fetched = jax.device_get(list(results))
    # In double precision: an fp32 sum over a long data set would lose digits.
    return {key: float(np.sum([r[key] for r in fetched], dtype=np.float64)) for key in fetched[0]}
