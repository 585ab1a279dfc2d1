"""Metrics of a task from sums and predictions. scikit-learn and scipy compute what GLUE asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

SMALLER_IS_BETTER = ("loss", "perplexity")
"""Metrics for which smaller is better; every other is better when larger."""


def masked_lm_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """`loss` (nats a masked token), `perplexity` = exp(loss) and masked-token `accuracy`, from summed statistics."""
    loss = sums["loss"] / sums["weight"]
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "accuracy": sums["correct"] / sums["weight"]}


def classification_metrics(
    logits: np.ndarray, labels: np.ndarray, loss: float, names: Sequence[str]
) -> dict[str, float]:
    """`loss` and the metrics `names` for logits `[rows, num_labels]` and labels `[rows]`.

    F1 is the positive class's for two labels and the macro mean for more.
    """
    return {"loss": loss, **{name: float(_METRICS[name](logits, labels)) for name in names}}


def _f1(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    average = "binary" if logits.shape[1] == 2 else "macro"
    return f1_score(labels, logits.argmax(-1), average=average, zero_division=0.0)


def _matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(labels, logits.argmax(-1))


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return accuracy_score(labels, logits.argmax(-1))


def _pearson(logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return 0.0 if _constant(logits[:, 0], labels) else pearsonr(logits[:, 0], labels).statistic


def _spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return 0.0 if _constant(logits[:, 0], labels) else spearmanr(logits[:, 0], labels).statistic


def _constant(*columns: np.ndarray) -> bool:
    # Correlation with a constant is not defined; no information is what it means here.
    return any(np.ptp(column) == 0 for column in columns)


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}


def score(metrics: Mapping[str, float], name: str) -> float:
    """The metric `name` turned so that larger is better."""
    return -metrics[name] if name in SMALLER_IS_BETTER else metrics[name]
