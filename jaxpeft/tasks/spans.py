"""The most likely answers in a context, from the logits of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from jaxpeft.data import QuestionAnsweringData

NUM_BEST = 20
"""Answers of a question that are compared, as in the scripts of SQuAD. Probabilities are shares among them."""


@dataclass(frozen=True)
class Span:
    """A possible answer: `start` and `stop` are its characters in the context; `score` is the sum of its two logits."""

    start: int
    stop: int
    score: float


@dataclass(frozen=True)
class Candidates:
    """The possible answers to a question.

    Attributes:
        spans: the best ones, best first; () if the context has no tokens.
        none: the score of "no answer": the two logits of [CLS], the smallest sum over all rows of the question.
    """

    spans: tuple[Span, ...]
    none: float

    @property
    def difference(self) -> float:
        """The score of no answer, less that of the best one; infinite if there is none."""
        return self.none - self.spans[0].score if self.spans else np.inf

    def probabilities(self, *, with_none: bool) -> tuple[np.ndarray, float]:
        """The softmax over the scores of the spans, `[spans]`, and over that of no answer; its share is 0 if it does not take part."""
        values = [span.score for span in self.spans] + ([self.none] if with_none or not self.spans else [])
        weights = np.exp(np.array(values) - max(values))
        weights /= weights.sum()
        shares = weights[: len(self.spans)]
        return shares, float(weights[-1]) if len(weights) > len(shares) else 0.0


def candidates(logits: Iterable[np.ndarray], rows: np.ndarray, data: QuestionAnsweringData) -> list[Candidates]:
    """The possible answers to every question of `data`. A span that is in several rows counts by the best of them.

    Args:
        logits: of each row `[length, 2]`: an answer starts, and ends, with the token.
        rows: `[rows]` int, the numbers of these rows. All rows of `data` must be there.
        data: the questions.
    """
    spans: list[dict[tuple[int, int], float]] = [{} for _ in range(data.num_questions)]
    none = np.full(data.num_questions, np.inf)
    for scores, row in zip(logits, rows.tolist(), strict=True):
        question, (first, stop) = int(data.questions[row]), data.spans[row]
        none[question] = min(none[question], float(scores[0, 0]) + float(scores[0, 1]))
        characters = data.characters[data.encoded.offsets[row] + first : data.encoded.offsets[row] + stop]
        for i, j, score in zip(*best_pairs(scores[first:stop], data.max_answer_length, NUM_BEST), strict=True):
            place = int(characters[i, 0]), int(characters[j, 1])
            spans[question][place] = max(score, spans[question].get(place, -np.inf))
    return [Candidates(_best(found), float(score)) for found, score in zip(spans, none, strict=True)]


def best_pairs(logits: np.ndarray, max_length: int, number: int) -> tuple[list[int], list[int], list[float]]:
    """The first tokens, the last tokens and the scores of the `number` best spans of at most `max_length` tokens, best first.

    All spans of `logits`, `[tokens, 2]`, are compared, not only those of the best starts and ends.
    """
    starts, ends = logits.astype(np.float64).T
    depth = min(max_length, len(starts))
    if not depth:
        return [], [], []
    scores = np.full((depth, len(starts)), -np.inf)  # by the span's length - 1 and its first token
    for longer in range(depth):
        scores[longer, : len(starts) - longer] = starts[: len(starts) - longer] + ends[longer:]
    flat = scores.ravel()
    found = np.argpartition(-flat, number - 1)[:number] if len(flat) > number else np.arange(len(flat))
    found = found[np.isfinite(flat[found])]
    found = found[np.lexsort((found, -flat[found]))]
    more, first = np.divmod(found, len(starts))
    return first.tolist(), (first + more).tolist(), flat[found].tolist()


def _best(found: dict[tuple[int, int], float]) -> tuple[Span, ...]:
    best = sorted(found.items(), key=lambda each: -each[1])[:NUM_BEST]
    return tuple(Span(start, stop, score) for (start, stop), score in best)
