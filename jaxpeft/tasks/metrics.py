"""The metrics: their names, their direction, and their computation. scikit-learn and scipy compute the metrics of GLUE."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.errors import InputError, did_you_mean

_QUERIES_PER_PRODUCT = 1024
"""Queries that are compared with all documents at a time, so that memory grows with the number of documents only."""


@dataclass(frozen=True)
class Metric:
    """A figure of merit: its title, its direction, and how to compute it.

    Attributes:
        title: its name for readers.
        larger_is_better: False for losses.
        function: `(logits [rows, classes], labels [rows]) → value`; None if the task computes it in its own way.
        digits: decimals to show.
    """

    title: str
    larger_is_better: bool = True
    function: Callable[[np.ndarray, np.ndarray], Any] | None = None
    digits: int = 4

    def compute(self, logits: np.ndarray | None, labels: np.ndarray | None) -> float:
        """The value for `logits: [rows, classes]` and `labels: [rows]`."""
        assert self.function is not None, f"{self.title} is computed by the task"
        assert logits is not None, f"{self.title} needs logits"
        assert labels is not None, f"{self.title} needs labels"
        with without_warnings():
            return float(self.function(logits, labels))

    def in_words(self, value: float) -> str:
        """The value as text, with `digits` decimals."""
        return f"{value:,.{self.digits}f}" if self.digits < 4 else f"{value:.{self.digits}f}"


@contextmanager
def without_warnings() -> Iterator[None]:
    """Hide scikit-learn's guess that few rows of many classes are meant to be numbers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        yield


def perplexity(loss: float) -> float:
    """exp(loss), infinite if that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _f1(logits: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.metrics import f1_score

    # F1 of the positive class for two labels, and the macro mean for more.
    average = "binary" if logits.shape[1] == 2 else "macro"
    return f1_score(labels, logits.argmax(-1), average=average, zero_division=0.0)


def _matthews(logits: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, logits.argmax(-1))


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, logits.argmax(-1))


def _pearson(logits: np.ndarray, labels: np.ndarray) -> Any:
    from scipy.stats import pearsonr

    return 0.0 if _constant(logits[:, 0], labels) else pearsonr(logits[:, 0], labels).statistic


def _spearman(logits: np.ndarray, labels: np.ndarray) -> Any:
    from scipy.stats import spearmanr

    return 0.0 if _constant(logits[:, 0], labels) else spearmanr(logits[:, 0], labels).statistic


def retrieval_ranks(
    queries: np.ndarray, documents: np.ndarray, query_ids: np.ndarray, document_ids: np.ndarray
) -> np.ndarray:
    """The rank of each query's document among all documents by cosine, `[n]` int, 1 for the nearest.

    Row i of `documents` belongs to row i of `queries`. A document that is as near as the right one counts as nearer. Left out are the
    documents that also belong to the query: equal ones, those of queries that are equal to it, and the query itself.

    Args:
        queries: `[n, d]`, of length 1.
        documents: the same.
        query_ids: `[n]`, equal for equal texts.
        document_ids: the same, by the same numbers.
    """
    ranks = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), _QUERIES_PER_PRODUCT):
        rows = slice(start, start + _QUERIES_PER_PRODUCT)
        cosine = queries[rows] @ documents.T
        own = np.take_along_axis(cosine, np.arange(len(queries))[rows, None], axis=1)
        query, document = query_ids[rows, None], document_ids[rows, None]
        also_right = (document_ids == document) | (document_ids == query) | (query_ids == query)
        ranks[rows] = 1 + ((cosine >= own) & ~also_right).sum(1)
    return ranks


def _constant(*columns: np.ndarray) -> bool:
    # Correlation with a constant is undefined. Here it counts as 0, because constant predictions carry no information.
    return any(np.ptp(column) == 0 for column in columns)


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", larger_is_better=False),
    "perplexity": Metric("perplexity", larger_is_better=False, digits=1),
    "pseudo_perplexity": Metric("pseudo-perplexity", larger_is_better=False, digits=1),
    "accuracy": Metric("accuracy", function=_accuracy),
    "f1": Metric("F1", function=_f1),
    "precision": Metric("precision"),
    "recall": Metric("recall"),
    "has_answer_f1": Metric("F1 of questions with an answer"),
    "has_answer_exact_match": Metric("exact match of questions with an answer"),
    "no_answer_f1": Metric("F1 of questions without an answer"),
    "no_answer_exact_match": Metric("exact match of questions without an answer"),
    "matthews": Metric("Matthews correlation", function=_matthews),
    "micro_f1": Metric("F1 (micro)"),
    "macro_f1": Metric("F1 (macro)"),
    "exact_match": Metric("exact match"),
    "ndcg_at_10": Metric("NDCG@10"),
    "mrr_at_10": Metric("MRR@10"),
    "average_precision": Metric("average precision"),
    "pearson": Metric("Pearson correlation", function=_pearson),
    "spearman": Metric("Spearman correlation", function=_spearman),
    "mrr": Metric("mean reciprocal rank"),
    "recall_at_1": Metric("recall@1"),
    "recall_at_10": Metric("recall@10"),
}
"""Name → metric. A new metric is one line here."""


def get_metric(name: str) -> Metric:
    """The metric called `name`.

    Raises:
        InputError: there is no such metric.
    """
    if name not in METRICS:
        raise InputError(f"there is no metric '{name}'{did_you_mean(name, METRICS)}; there are {', '.join(METRICS)}")
    return METRICS[name]


def score(metrics: Mapping[str, float], name: str) -> float:
    """The value of the metric `name`, negated if smaller is better, so that a larger score is always better."""
    return metrics[name] if get_metric(name).larger_is_better else -metrics[name]
