"""Question answering: a question and its context in one row, or in several if the context is long.

A row is the question and a window over the context's tokens. Rows are batched by length, as those of a classification.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Self

import numpy as np

from jaxpeft.data.classification import BUCKET_LENGTHS, ClassificationData, Encoded, cap_buckets
from jaxpeft.data.questions import Answer
from jaxpeft.data.splits import HOLD_OUT_SEED
from jaxpeft.data.token_cache import Chunk, Origin, TokenCache, TokenRows, tokenised
from jaxpeft.data.windows import windows
from jaxpeft.errors import InputError

STRIDE = 128
MAX_ANSWER_LENGTH = 30
_TEXTS_PER_CALL = 256
_CONTEXT = 1  # the context's number among the two texts of a row
_COLUMNS = ("input_ids", "token_type_ids", "sequences", "starts", "stops")
NO_ANSWER = (0, 0)
"""The label of a row without the answer: its first token, [CLS]."""


class LongQuestion(InputError):
    """A question that leaves too little room for its context. `row` is its number, from 0."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True, eq=False)
class QuestionAnsweringData(ClassificationData):
    """Questions in rows, each with a window over its context. Labels are the first and the last token of the answer, `[rows, 2]` int32.

    Both are 0, the place of [CLS], if the row's window does not hold the whole answer.

    Attributes:
      contexts: the contexts of all questions.
      answers: of every question the texts of its right answers, () if it has none; None if they are unknown.
      questions: `[rows]` int, the number of each row's question.
      spans: `[rows, 2]` int, the first token of the row that is of the context, and the one after the last.
      characters: `[tokens, 2]` int32, the place of each token's first character in its text, and of the one after its last.
      max_answer_length: the most tokens of an answer.
    """

    contexts: Sequence[str]
    answers: Sequence[tuple[str, ...]] | None
    questions: np.ndarray
    spans: np.ndarray
    characters: np.ndarray
    max_answer_length: int

    @property
    def num_questions(self) -> int:
        """The number of questions."""
        return len(self.contexts)

    def sample(self, num_rows: int) -> Self:
        """Some of the questions, chosen at random with a fixed seed, with all their rows: at most `num_rows`, or a single question."""
        order = np.random.default_rng(HOLD_OUT_SEED).permutation(self.num_questions)
        rows = np.cumsum(np.bincount(self.questions, minlength=self.num_questions)[order])
        chosen = np.sort(order[: max(int(np.searchsorted(rows, num_rows, side="right")), 1)])
        part = self.take(np.flatnonzero(np.isin(self.questions, chosen)))
        return replace(
            part,
            contexts=[self.contexts[int(question)] for question in chosen],
            answers=None if self.answers is None else [self.answers[question] for question in chosen],
            questions=np.searchsorted(chosen, part.questions),
        )

    def take(self, rows: np.ndarray) -> Self:
        """The given rows. Questions keep their numbers, even if none of their rows is left."""
        part = replace(
            self,
            questions=self.questions[rows],
            spans=self.spans[rows],
            characters=self.characters[self.tokens_of(rows)],
        )
        return super(QuestionAnsweringData, part).take(rows)


def question_answering_data(
    questions: Sequence[str],
    contexts: Sequence[str],
    labels: np.ndarray | None,
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    stride: int = STRIDE,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    bucket_lengths: Sequence[int] = BUCKET_LENGTHS,
    cache: TokenCache | None = None,
) -> QuestionAnsweringData:
    """Encode questions and contexts as `QuestionAnsweringData`.

    A question is never cut. A context that does not fit beside it becomes several rows, which share tokens. They start at the context's
    beginning, or, if the tokenizer cuts texts at the left, at its end.

    Args:
      questions: one question per row of the data.
      contexts: the text that may hold its answer.
      labels: `[questions]` objects, each a tuple of `Answer`; a row is trained on the first. None (for prediction) gives [CLS].
      tokenizer: a fast tokenizer of transformers, whose first token is [CLS].
      max_length: maximum tokens per row, including special ones.
      batch_size: rows per batch.
      seed: the run's seed; decides the training order.
      stride: tokens of a context that two consecutive rows share, at most half of those that fit.
      max_answer_length: the most tokens of an answer that is predicted.
      bucket_lengths: possible lengths of a batch. Those above `max_length` are dropped, and `max_length` is added.
      cache: keeps the tokens for later calls, if `questions` are a `TextColumn`.

    Raises:
      LongQuestion: a question leaves less than a quarter of `max_length` to its context.
      InputError: there are no questions, the columns differ in length, the tokenizer does not fit, or an answer has no token.
    """
    if not questions:
        raise InputError("there are no questions; give at least one row")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is too small; give at least 1")
    if len(contexts) != len(questions) or (labels is not None and len(labels) != len(questions)):
        raise InputError(f"{len(questions)} questions and {len(contexts)} contexts; give a context per question")
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not know the places of its tokens in a text; use a fast tokenizer (tokenizer.json)"
        )
    whole = tokenised(
        Origin("questions", (questions, contexts), tokenizer, 0),
        _COLUMNS,
        partial(_chunks, questions, contexts, tokenizer),
        cache,
    )
    if (
        tokenizer.cls_token_id is None
        or (whole.tokens["input_ids"][whole.offsets[:-1]] != tokenizer.cls_token_id).any()
    ):
        raise InputError(
            f"{type(tokenizer).__name__} does not begin a row with [CLS], which means 'no answer here'; give another model.tokenizer"
        )
    rows = _Rows(whole, questions, max_length, stride, tokenizer.truncation_side == "left")
    found = [rows.of(i, None if labels is None else labels[i]) for i in range(len(questions))]
    places = [place for places, _, _ in found for place in places]
    tokens = np.concatenate(places)
    encoded = Encoded(
        whole.tokens["input_ids"][tokens],
        whole.tokens["token_type_ids"][tokens],
        np.cumsum([0, *map(len, places)], dtype=np.int64),
        0,
        max_length,
        tokenizer.pad_token_id,
    )
    return QuestionAnsweringData(
        encoded,
        np.array([label for _, _, labels in found for label in labels], np.int32),
        batch_size,
        cap_buckets(bucket_lengths, max_length),
        seed,
        contexts,
        None if labels is None else [tuple(text for text, _ in answers) for answers in labels],
        np.repeat(np.arange(len(found)), [len(places) for places, _, _ in found]),
        np.array([span for _, spans, _ in found for span in spans]),
        np.stack([whole.tokens["starts"][tokens], whole.tokens["stops"][tokens]], axis=1),
        max_answer_length,
    )


@dataclass(frozen=True)
class _Rows:
    """Makes the rows of questions, each of which is tokenised with its `whole` context."""

    whole: TokenRows
    questions: Sequence[str]
    max_length: int
    stride: int
    from_the_end: bool

    def of(
        self, number: int, answers: Sequence[Answer] | None
    ) -> tuple[list[np.ndarray], list[tuple[int, int]], list[tuple[int, int]]]:
        """The rows of a question: the places of their tokens in `whole`, their spans of the context, and their labels."""
        start, stop = self.whole.offsets[number : number + 2].tolist()
        of_context = np.flatnonzero(self.whole.tokens["sequences"][start:stop] == _CONTEXT)
        length, before = len(of_context), int(of_context[0]) if len(of_context) else stop - start
        room = self.max_length - (stop - start - length)
        if room < self.max_length // 4:
            raise LongQuestion(
                number,
                f"the question {self.questions[number][:40]!r} has, with the special tokens, {stop - start - length} tokens, so "
                f"data.max_length {self.max_length} leaves {max(room, 0)} to the context; shorten it, or raise data.max_length",
            )
        found = windows(length, room, min(self.stride, room // 2))
        if self.from_the_end:
            found = [(length - last, length - first) for first, last in reversed(found)]
        answer = self._tokens_of(answers[0], start + before, length) if answers else None
        places, spans, labels = [], [], []
        for first, last in found:
            context = np.arange(start + before + first, start + before + last)
            after = np.arange(start + before + length, stop)
            places.append(np.concatenate([np.arange(start, start + before), context, after]))
            spans.append((before, before + last - first))
            inside = answer is not None and first <= answer[0] and answer[1] < last
            labels.append((before + answer[0] - first, before + answer[1] - first) if answer and inside else NO_ANSWER)
        return places, spans, labels

    def _tokens_of(self, answer: Answer, start: int, length: int) -> tuple[int, int]:
        """The first and the last token of an answer, counted from the context's first, which is `start` in `whole`."""
        text, character = answer
        tokens = self.whole.tokens
        first = np.searchsorted(tokens["stops"][start : start + length], character, side="right")
        last = np.searchsorted(tokens["starts"][start : start + length], character + len(text), side="left") - 1
        if last < first:
            raise InputError(f"the tokenizer makes no token of the answer {text!r}; leave this question out")
        return int(first), int(last)


def _chunks(questions: Sequence[str], contexts: Sequence[str], tokenizer: Any) -> Iterator[Chunk]:
    """Every question with its whole context, tokenised."""
    for start in range(0, len(questions), _TEXTS_PER_CALL):
        rows = slice(start, start + _TEXTS_PER_CALL)
        # verbose=False: transformers would warn about long rows, which become several.
        chunk = tokenizer(
            list(questions[rows]),
            list(contexts[rows]),
            return_token_type_ids=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        lengths = [len(ids) for ids in chunk["input_ids"]]
        tokens = {name: np.fromiter(chain.from_iterable(chunk[name]), np.int32) for name in _COLUMNS[:2]}
        sequences = chain.from_iterable(chunk.sequence_ids(i) for i in range(len(lengths)))
        tokens["sequences"] = np.fromiter((-1 if number is None else number for number in sequences), np.int32)
        offsets = np.array([pair for row in chunk["offset_mapping"] for pair in row], np.int32).reshape(-1, 2)
        tokens |= {"starts": offsets[:, 0], "stops": offsets[:, 1]}
        yield Chunk(tokens, np.asarray(lengths, np.int64))
