"""Exact match and F1 of answers, as the evaluation script of SQuAD 2.0 counts them (Rajpurkar et al. 2018). It fits 1.1, too.

Here 1 is the best value; the script prints percent. The script of SQuAD 1.1 differs only for answers that are nothing but articles
and punctuation.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """`text` in lower case, without ASCII punctuation and articles, and with single blanks between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(text: str, answer: str) -> float:
    """1.0 if both are the same after normalisation, else 0.0."""
    return float(normalised(text) == normalised(answer))


def f1(text: str, answer: str) -> float:
    """The F1 of the words that both have in common. If one has no words, 1.0 if the other has none, else 0.0."""
    words, right = normalised(text).split(), normalised(answer).split()
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))


def scores(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Exact match and F1 of each text, the best over its right answers: `[questions]` float64 each.

    Args:
        texts: the predicted answers, "" for none.
        answers: the right answers of each question; none of them mean that "" is right.
    """
    right = [[answer for answer in each if normalised(answer)] or [""] for each in answers]
    pairs = list(zip(texts, right, strict=True))
    exact, words = (
        np.array([max(measure(text, answer) for answer in each) for text, each in pairs])
        for measure in (exact_match, f1)
    )
    return exact, words


def best_threshold(differences: np.ndarray, gains: np.ndarray) -> float:
    """The threshold below which a question is best answered: the total gain of the questions with a smaller difference is largest.

    It lies between two differences, or 1 beyond all of them. Of equally good ones it is the smallest.

    Args:
        differences: `[questions]`, the score of no answer less that of the best answer.
        gains: `[questions]`, the score that a question gains if it is answered.
    """
    if not len(differences):
        return 0.0
    order = np.argsort(differences, kind="stable")
    differences, totals = differences[order], np.concatenate([[0.0], np.cumsum(gains[order])])
    # Questions of the same difference are answered together.
    cuts = np.flatnonzero(np.concatenate([[True], np.diff(differences) > 0, [True]]))
    cut = int(cuts[np.argmax(totals[cuts])])
    around = np.concatenate([[differences[0] - 2], differences, [differences[-1] + 2]])
    return float((around[cut] + around[cut + 1]) / 2)
