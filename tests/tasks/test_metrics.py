import math

import numpy as np
import pytest

from jaxpeft.errors import InputError
from jaxpeft.tasks.classification import Classification
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.tasks.metrics import get_metric, score


def measured_lm(sums):
    return MaskedLM().measure(sums, None, None)


def measured(logits, labels, loss, names):
    return Classification(logits.shape[1], tuple(names)).measure({"loss": loss, "weight": 1.0}, logits, labels)


def test_perplexity_is_the_exponential_of_the_mean_loss():
    metrics = measured_lm({"loss": 4 * math.log(7), "weight": 4.0, "correct": 1.0})
    assert metrics == pytest.approx({"loss": math.log(7), "perplexity": 7, "accuracy": 0.25})
    assert measured_lm({"loss": 1e6, "weight": 1.0, "correct": 0.0})["perplexity"] == math.inf


def test_classification_by_hand():
    """Predictions 1, 1, 0, 0 of labels 1, 0, 0, 1: precision and recall 1/2, no correlation."""
    logits, labels = np.array([[0, 1], [0, 1], [1, 0], [1, 0]]), np.array([1, 0, 0, 1])
    metrics = measured(logits, labels, 0.5, ["accuracy", "f1", "matthews"])
    assert metrics == {"loss": 0.5, "accuracy": 0.5, "f1": 0.5, "matthews": 0.0}


def test_f1_of_three_labels_is_the_macro_mean():
    """Label 0: precision 1/2, recall 1: 2/3. Label 1: 0. Label 2: 1."""
    logits, labels = np.eye(3)[[0, 0, 2]], np.array([0, 1, 2])
    assert measured(logits, labels, 0.0, ["f1"])["f1"] == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_correlations():
    logits, labels = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 9.0])
    metrics = measured(logits, labels, 0.0, ["pearson", "spearman"])
    assert metrics["spearman"] == pytest.approx(1)
    assert metrics["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], labels)[0, 1])


def test_a_score_is_larger_when_better():
    metrics = {"loss": 2.0, "perplexity": 3.0, "accuracy": 0.5}
    assert [score(metrics, name) for name in metrics] == [-2.0, -3.0, 0.5]


def test_the_correlation_of_constant_predictions_is_no_information():
    constant = np.zeros((3, 1), np.float32)
    metrics = measured(constant, np.arange(3.0), 0.5, ("pearson", "spearman"))
    assert (metrics["pearson"], metrics["spearman"]) == (0.0, 0.0)


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match=r"no metric 'acuracy'; did you mean 'accuracy'\?"):
        get_metric("acuracy")
