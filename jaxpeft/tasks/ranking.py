"""The metrics of a ranking: texts are ranked by their scores, for each query by itself."""

from __future__ import annotations

import numpy as np

from jaxpeft.data import RELEVANT


def ranking(scores: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, most: int) -> tuple[float, float]:
    """NDCG and MRR of the first `most` texts, as means over the queries that have texts to rank (`is_ranked`); NaN if none has.

    NDCG is scikit-learn's, with the labels as gains. MRR is the mean of 1 / rank of the first relevant text, 0 if it is behind the
    first `most`. Texts with the same score as a relevant one count as before it, unless they are relevant too.

    Args:
        scores: `[rows]`; larger is better.
        labels: `[rows]` from 0 to 1.
        queries: `[rows]` int, the number of each row's query.
        most: the number of texts.
    """
    from sklearn.metrics import ndcg_score

    order = np.argsort(queries, kind="stable")
    gains, reciprocals = [], []
    for rows in np.split(order, np.flatnonzero(np.diff(queries[order])) + 1):
        right, found = labels[rows] >= RELEVANT, scores[rows]
        if len(rows) < 2 or not right.any():
            continue
        rank = 1 + int((found[~right] >= found[right].max()).sum())
        reciprocals.append(1 / rank if rank <= most else 0.0)
        gains.append(ndcg_score([labels[rows]], [found], k=most))
    return (float(np.mean(gains)), float(np.mean(reciprocals))) if gains else (float("nan"), float("nan"))
