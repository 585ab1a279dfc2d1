"""Sentence embeddings of pairs with a number each: the more similar two texts are, the larger it is, as in GLUE's STS-B.

The loss is CoSENT's (Huang et al. 2024, doi 10.1109/TASLP.2024.3402087): log(1 + Σ exp(s · (cos i − cos j))) over all rows i and j of a
batch of which i has the smaller number. Only the order of the numbers matters, not their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.tasks.base import Batch
from jaxpeft.tasks.metrics import get_metric
from jaxpeft.tasks.sentence_embeddings import SentenceEmbeddings, by_row, cosines


@dataclass(frozen=True)
class ScoredPairs(SentenceEmbeddings):
    """Embeds texts so that cosines are in the order of the numbers. All else is as for pairs without numbers."""

    reported_metrics: ClassVar[tuple[str, ...]] = ("spearman", "pearson")

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The loss of the whole batch, for each of its rows: `[rows]`. A row of weight 0 is not compared."""
        scores = self.scale * cosines(by_row(logits, batch))
        labels, real = batch["labels"], batch["weights"] > 0
        compared = (labels[:, None] < labels) & real[:, None] & real
        differences = jnp.where(compared, scores[:, None] - scores, -jnp.inf)
        loss = jax.nn.logsumexp(jnp.concatenate([jnp.zeros(1, scores.dtype), differences.reshape(-1)]))
        return jnp.broadcast_to(loss, scores.shape)

    def gathered(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The cosine of every row, `[n, 1]`, and its number."""
        real = np.asarray(batch["weights"]) > 0
        return cosines(by_row(outputs, batch))[real, None], np.asarray(batch["labels"])[real]

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss`, the mean over the evaluation batches, and the correlations of all cosines with the numbers."""
        loss = sums["loss"] / sums["weight"]
        return {"loss": loss, **{name: get_metric(name).compute(outputs, labels) for name in self.metrics}}

    @property
    def _figures(self) -> str:
        return "Correlations are those of the pairs' cosines with their numbers; the loss compares the pairs of one evaluation batch."
