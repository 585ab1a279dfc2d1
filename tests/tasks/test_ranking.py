"""NDCG and MRR by hand, and beside scikit-learn's and a plain ranking."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from jaxpeft.tasks.ranking import ranking


def test_by_hand():
    """Query 0: the relevant text is second. Query 1: first. Query 2 has none, and query 3 a single text."""
    scores = np.array([0.3, 0.9, 0.1, 2.0, -1.0, 0.5, 0.4, 0.0])
    labels = np.array([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    queries = np.array([0, 0, 0, 1, 1, 2, 2, 3])
    ndcg, mrr = ranking(scores, labels, queries, most=10)
    assert mrr == pytest.approx((1 / 2 + 1) / 2)
    assert ndcg == pytest.approx((1 / np.log2(3) + 1) / 2)


def test_rows_of_a_query_need_not_stand_together():
    rng = np.random.default_rng(0)
    scores, labels, queries = rng.normal(size=200), (rng.random(200) < 0.2).astype(float), rng.integers(0, 12, 200)
    expected = ranking(scores, labels, queries, most=10)
    order = rng.permutation(200)
    assert ranking(scores[order], labels[order], queries[order], most=10) == pytest.approx(expected)


@pytest.mark.parametrize("most", [1, 3, 10])
def test_beside_a_plain_ranking(most):
    rng = np.random.default_rng(1)
    scores, labels, queries = rng.normal(size=300), (rng.random(300) < 0.15).astype(float), rng.integers(0, 20, 300)
    gains, reciprocals = [], []
    for query in range(20):
        right, found = labels[queries == query], scores[queries == query]
        if not right.any():
            continue
        gains.append(ndcg_score([right], [found], k=most))
        first = np.flatnonzero(right[np.argsort(-found)])[0] + 1
        reciprocals.append(1 / first if first <= most else 0)
    assert ranking(scores, labels, queries, most=most) == pytest.approx((np.mean(gains), np.mean(reciprocals)))


def test_graded_labels_are_gains():
    ndcg, mrr = ranking(np.array([3.0, 2.0, 1.0]), np.array([0.4, 1.0, 0.6]), np.zeros(3, int), most=10)
    ideal = 1 + 0.6 / np.log2(3) + 0.4 / 2
    assert ndcg == pytest.approx((0.4 + 1 / np.log2(3) + 0.6 / 2) / ideal)
    assert mrr == 0.5  # from 0.5 on, a text is relevant


def test_equal_scores_are_no_merit():
    """A model that says the same of all texts does not find the first of them."""
    labels = np.array([1.0, 0.0, 0.0, 0.0])
    ndcg, mrr = ranking(np.zeros(4), labels, np.zeros(4, int), most=10)
    assert mrr == 1 / 4
    assert ndcg == pytest.approx(ndcg_score([labels], [np.zeros(4)]))


def test_nothing_to_rank():
    assert all(np.isnan(ranking(np.zeros(2), np.zeros(2), np.array([0, 1]), most=10)))
