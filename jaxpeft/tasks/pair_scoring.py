"""Pair scoring (a cross-encoder): one score from 0 to 1 for a query and a text, by which texts are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import numpy as np
import optax

from jaxpeft.data import (
    RELEVANT,
    QueryData,
    ReadOptions,
    Split,
    Splits,
    Tables,
    encode_scores,
    hold_out_queries,
    is_ranked,
    query_ids,
    text_splits,
)
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Answers, Batch, Task
from jaxpeft.tasks.ranking import ranking
from jaxpeft.tasks.regression import Regression
from jaxpeft.tasks.text_pipeline import TextPipeline


@dataclass(frozen=True)
class PairScoring(Regression):
    """Scores pairs. Logits are `[pairs, 1]`, and the score is their logistic function. The first text of a pair is the query."""

    name = "pair-scoring"
    title = "pair scoring"
    pipeline_tag = "text-ranking"
    known_metrics = ("loss", "ndcg_at_10", "mrr_at_10", "average_precision", "accuracy")
    reported_metrics = ("ndcg_at_10", "mrr_at_10", "average_precision", "accuracy")
    label_flags = ("drop_unlabelled",)
    problem_type = "multi_label_classification"  # of transformers' losses this is the binary cross-entropy
    example = "How do I merge an adapter?"
    example_pair = "Run merge: it writes a plain model."

    @classmethod
    def read(cls, tables: Tables, options: ReadOptions) -> Splits:
        """The pairs of a dataset, with scores as labels. Without a validation split, the rows of some queries are held out.

        Raises:
            InputError: as `text_splits` and `encode_scores`.
        """
        return text_splits(tables, replace(options, num_labels=1), encode_scores, hold_out_queries)

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The task, with all of its metrics."""
        return cls(1, cls.reported_metrics)

    def check_data(self, splits: Splits) -> None:
        """Raise InputError if the data has no labels or no pairs, or if all rows of a split are relevant, or none."""
        Task.check_data(self, splits)
        if splits.train.pairs is None:
            raise InputError(
                f"{self.name} needs two texts in each row, and {splits.source} has one; name both columns with data.text_column (the "
                "query) and data.text_pair_column"
            )
        for name, split in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
            if split is None:
                continue
            assert split.labels is not None
            number = int((split.labels >= RELEVANT).sum())
            if number in (0, len(split)):
                which = "none" if not number else "each"
                raise InputError(
                    f"{splits.source}: {which} of the {len(split)} {name} rows has a label of at least {RELEVANT}; {self.name} needs pairs "
                    "that belong together and others that do not: check data.label_column, or give other files"
                )

    def for_splits(self, splits: Splits) -> Self:
        """The task with the metrics of a ranking only if there are texts to rank in validation and test."""
        for split in (splits.validation, splits.test):
            if split is not None and not _ranked_queries(split)[0]:
                return replace(self, metrics=("average_precision", "accuracy"))
        return self

    def data_notes(self, splits: Splits) -> list[str]:
        """The numbers of queries that are left out of the metrics of a ranking."""
        notes = []
        for name, split in (("validation", splits.validation), ("test", splits.test)):
            if split is not None:
                number, of = _ranked_queries(split)
                if number < of:
                    said = f"{of - number} of {of} queries" if number else "all queries"
                    notes.append(
                        f"{said} of {name} have no relevant text or only one text, and are left out of NDCG and MRR"
                    )
        return notes

    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> QueryData:
        """One row per pair, batched by length."""
        return QueryData.of(super().make_data(split, pipeline, batch_size=batch_size, seed=seed), split.texts)

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The binary cross-entropy in nats, `[pairs]`."""
        return optax.sigmoid_binary_cross_entropy(logits[..., 0], batch["labels"])

    def gathered(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The logits `[n]`, and for each the label and the number of its row, `[n, 2]` float64."""
        real = np.asarray(batch["weights"]) > 0
        labels = np.stack([np.asarray(batch["labels"], np.float64)[real], np.asarray(batch["rows"])[real]], axis=1)
        return outputs[real, 0], labels

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss`, and those of `metrics` that are measured: NDCG and MRR of the first 10 texts, as means over the queries; average
        precision over all pairs; and accuracy at a score of 0.5."""
        from sklearn.metrics import average_precision_score

        assert outputs is not None
        assert labels is not None
        scores, rows = labels[:, 0], labels[:, 1].astype(np.int64)
        relevant = scores >= RELEVANT
        found = {
            "loss": sums["loss"] / sums["weight"],
            "average_precision": float(average_precision_score(relevant, outputs)) if relevant.any() else 0.0,
            "accuracy": float(np.mean((outputs > 0) == relevant)),
        }
        if {"ndcg_at_10", "mrr_at_10"} & set(self.metrics):
            found["ndcg_at_10"], found["mrr_at_10"] = ranking(outputs, scores, data.queries[rows], most=10)
        return {name: found[name] for name in ("loss", *self.metrics)}

    def answers(self, logits: np.ndarray, label_names: Sequence[str] | None, top: int | None) -> list[Answers]:
        """The score of every pair, as a single answer with the name "score"."""
        from scipy.special import expit

        return [[("score", float(score))] for score in expit(logits[:, 0].astype(np.float64))]

    def as_record(self, answer: Answers) -> dict[str, Any]:
        """The number as `score`."""
        return dict(answer)

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python that print the score."""
        *lines, _ = super().torch_lines(sentence, pair)
        return [*lines, "print(model(**inputs).logits.sigmoid())"]


def _ranked_queries(split: Split) -> tuple[int, int]:
    """The number of queries with texts to rank, and of all queries."""
    assert split.labels is not None
    queries = query_ids(split.texts)
    ranked = is_ranked(split.labels, queries)
    return int(ranked.sum()), len(ranked)
