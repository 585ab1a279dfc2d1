"""Extractive question answering: the answer is a piece of the context (SQuAD: Rajpurkar et al. 2016), or there is none (SQuAD 2.0)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import (
    LongQuestion,
    QuestionAnsweringData,
    ReadOptions,
    Split,
    Splits,
    Tables,
    has_unanswerable,
    question_answering_data,
    question_splits,
    questions_to_answer,
    read_question_file,
)
from jaxpeft.data.classification import cap_buckets
from jaxpeft.data.question_answering import MAX_ANSWER_LENGTH, STRIDE
from jaxpeft.data.questions import NUM_OUTPUTS
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Batch, Questions, RowError, Task
from jaxpeft.tasks.spans import Candidates, candidates
from jaxpeft.tasks.squad_metrics import best_threshold, scores
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline

_OF_SQUAD_2 = ("has_answer_f1", "has_answer_exact_match", "no_answer_f1", "no_answer_exact_match")


@dataclass(frozen=True)
class PossibleAnswer:
    """A piece of a context: its text, its first character and the one after its last (counted from 0), and its probability."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class AnswerFound:
    """The answer to a question.

    Attributes:
        best: the answer; None if there is none.
        no_answer: the probability that there is none; None if the run's questions all have one.
        possible: the pieces of the context that are most likely, best first.
        asked: True if a number of pieces was asked for.
    """

    best: PossibleAnswer | None
    no_answer: float | None
    possible: tuple[PossibleAnswer, ...]
    asked: bool = False


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Finds the piece of a context that answers a question. Logits are `[rows, length, 2]`: an answer starts, and ends, with a token.

    A row whose window does not hold the whole answer has [CLS] for both, as in the scripts of BERT and transformers.

    Attributes:
        null_threshold: a question has no answer if the score of none exceeds that of the best answer by more than this; None: every
            question has one.
    """

    null_threshold: float | None = None

    name = "question-answering"
    title = "question answering"
    head = "question-answering"
    pipeline_tag = "question-answering"
    auto_class = "AutoModelForQuestionAnswering"
    known_metrics = ("loss", "f1", "exact_match", *_OF_SQUAD_2)
    reported_metrics = ("f1", "exact_match")
    has_classes = False
    label_flags = ("drop_unlabelled",)
    own_flags = ("doc_stride", "max_answer_length")
    example = "Who wrote the play?"
    example_pair = "The play was written by Anna Holm in 1924."
    read_file = staticmethod(read_question_file)

    @classmethod
    def read(cls, tables: Tables, options: ReadOptions) -> Splits:
        """The questions of a dataset, with a context and answers for each. Errors are those of `question_splits`."""
        return question_splits(tables, options)

    @classmethod
    def read_questions(cls, table: Any, where: str, options: ReadOptions) -> Split:
        """The questions of a table and their contexts."""
        return questions_to_answer(table, where, options)

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> QuestionAnswering:
        """The task for questions that all have an answer. The head has two outputs for each token."""
        return cls(NUM_OUTPUTS, cls.reported_metrics)

    def for_splits(self, splits: Splits) -> Self:
        """The task for the questions of `splits`; some of them may have no answer."""
        if not has_unanswerable(splits):
            return self
        return replace(self, metrics=(*self.metrics, *_OF_SQUAD_2), null_threshold=0.0)

    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> QuestionAnsweringData:
        """A row for each question, or several if its context is long; batched by length."""
        rows = pipeline.rows
        if split.pairs is None:
            raise InputError("a question needs a context; give one for each, in the second column or with --pairs")
        return question_answering_data(
            split.texts,
            split.pairs,
            split.labels,
            pipeline.tokenizer,
            max_length=rows.max_length,
            batch_size=batch_size,
            seed=seed,
            stride=_stride(rows),
            max_answer_length=rows.max_answer_length,
            bucket_lengths=rows.bucket_lengths,
            cache=rows.token_cache,
        )

    def make_questions(self, split: Split, pipeline: TextPipeline, *, batch_size: int, top: int | None) -> Questions:
        """The rows of an evaluation. An answer (`AnswerFound`) has the `top` most likely pieces of the context."""
        pipeline.check(split)
        try:
            data = self.make_data(replace(split, labels=None), pipeline, batch_size=batch_size, seed=0)
        except LongQuestion as error:
            raise RowError(error.row, str(error)) from None
        batches = list(data.eval_batches())

        def answers(outputs: Iterable[np.ndarray]) -> list[Any]:
            parts = [self.gathered(logits, batch) for logits, batch in zip(outputs, batches, strict=True)]
            logits, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
            found = candidates(logits, rows, data)
            return [self._answer(each, data.contexts[i], top) for i, each in enumerate(found)]

        return Questions(batches, answers)

    def _answer(self, found: Candidates, context: str, top: int | None) -> AnswerFound:
        shares, none = found.probabilities(with_none=self.null_threshold is not None)
        possible = tuple(
            PossibleAnswer(context[span.start : span.stop], span.start, span.stop, share)
            for span, share in zip(found.spans, shares.tolist(), strict=True)
        )
        return AnswerFound(
            possible[0] if self._is_answered(found) else None,
            None if self.null_threshold is None else none,
            possible[: top or 1],
            asked=top is not None,
        )

    def _is_answered(self, found: Candidates) -> bool:
        return bool(found.spans) and (self.null_threshold is None or found.difference <= self.null_threshold)

    def in_words(self, answer: AnswerFound) -> list[str]:
        """A line for the answer, and one for each other piece of the context that is likely."""
        lines = [
            f"{each.text!r}, characters {each.start} to {each.end}: {100 * each.score:.1f} %"
            for each in answer.possible
        ]
        if answer.no_answer is not None:
            lines.insert(0 if answer.best is None else 1, f"no answer: {100 * answer.no_answer:.1f} %")
        return lines or ["no answer: the context is empty"]

    def as_record(self, answer: AnswerFound) -> dict[str, Any]:
        """`answer` (empty if there is none), `start` and `end` (null if there is none) and `score`, the probability of this answer.

        `no_answer` is the probability that there is none, if the run's questions may have none. `possible` are the pieces of the
        context that are most likely, if a number of them was asked for.
        """
        best = answer.best
        record: dict[str, Any] = {
            "answer": best.text if best else "",
            "start": best.start if best else None,
            "end": best.end if best else None,
            "score": best.score if best else 1.0 if answer.no_answer is None else answer.no_answer,
        }
        if answer.no_answer is not None:
            record["no_answer"] = answer.no_answer
        if answer.asked:
            record["possible"] = [vars(each) for each in answer.possible]
        return record

    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> None:
        """None: the head reads all tokens."""
        return None

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The mean of the cross-entropies of start and end over all tokens of a row, in nats, `[rows]`, as in transformers."""
        return optax.softmax_cross_entropy_with_integer_labels(logits.swapaxes(1, 2), batch["labels"]).mean(-1)

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """`loss` and `weight`. Answers are compared on the host."""
        total, weight = self.loss(logits, batch)
        return {"loss": total, "weight": weight}

    def gathered(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The logits of each row, an object array of `[length, 2]`, and the numbers of the rows. The data has the answers."""
        real = np.flatnonzero(np.asarray(batch["weights"]) > 0)
        kept = np.empty(len(real), object)
        for i, row in enumerate(real):
            kept[i] = outputs[row]
        return kept, np.asarray(batch["rows"])[real]

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss`, and F1 and exact match of the answers to all questions; for SQuAD 2.0 also to those that have one, and to the others.

        Arguments are those of `gathered`, and the data.
        """
        assert outputs is not None
        assert labels is not None
        found = candidates(outputs, labels, data)
        texts = _texts([each if self._is_answered(each) else replace(each, spans=()) for each in found], data)
        exact, words = scores(texts, data.answers)
        metrics = {"loss": sums["loss"] / sums["weight"], "f1": words.mean(), "exact_match": exact.mean()}
        if self.null_threshold is not None:
            has_answer = np.array([bool(answers) for answers in data.answers])
            for name, rows in (("has_answer", has_answer), ("no_answer", ~has_answer)):
                if rows.any():
                    metrics |= {f"{name}_f1": words[rows].mean(), f"{name}_exact_match": exact[rows].mean()}
        return {name: float(value) for name, value in metrics.items()}

    def calibrated(self, outputs: np.ndarray, labels: np.ndarray, data: Any = None) -> Self:
        """The task with the threshold that gives the best F1 on these rows."""
        if self.null_threshold is None:
            return self
        found = candidates(outputs, labels, data)
        _, words = scores(_texts(found, data), data.answers)
        has_answer = np.array([bool(answers) for answers in data.answers])
        gains = np.where(has_answer, words, -1.0)
        differences = np.array([each.difference for each in found])
        open_questions = np.isfinite(differences)
        return replace(self, null_threshold=best_threshold(differences[open_questions], gains[open_questions]))

    @property
    def calibration(self) -> dict[str, float]:
        """The threshold, if questions may have no answer."""
        return {} if self.null_threshold is None else {"null_threshold": self.null_threshold}

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of token ids, mask and types, `[batch_size, length]`, of `labels`, `[batch_size, 2]`, and `weights`, `[batch_size]`."""
        ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        labels = jax.ShapeDtypeStruct((batch_size, NUM_OUTPUTS), jnp.int32)
        weights = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "labels": labels, "weights": weights}

    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """The bucket lengths, up to `rows.max_length`."""
        return cap_buckets(rows.bucket_lengths, rows.max_length)

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python that print the best answer of at most 30 tokens."""
        answer = "context[inputs.token_to_chars(start).start : inputs.token_to_chars(end).end]"
        if self.null_threshold is not None:
            answer = f'"no answer" if scores[0, 0] - scores[start, end] > {self.null_threshold:.4f} else {answer}'
        return [
            "import torch",
            "",
            f"question, context = {sentence!r}, {pair or self.example_pair!r}",
            'inputs = tokenizer(question, context, return_tensors="pt")',
            "output, length = model(**inputs), inputs.input_ids.shape[1]",
            "scores = output.start_logits[0, -length:].unsqueeze(1) + output.end_logits[0, -length:]",
            "inside = torch.tensor([number == 1 for number in inputs.sequence_ids()])",
            f"allowed = (inside.unsqueeze(1) & inside).triu().tril({MAX_ANSWER_LENGTH - 1})",
            "start, end = divmod(scores.masked_fill(~allowed, -1e9).argmax().item(), length)",
            f"print({answer})",
        ]

    def notes(self, rows: RowOptions) -> list[str]:
        """How answers are found and counted."""
        lines = [
            "F1 and exact match are those of SQuAD's evaluation script, where 1 is 100 %. An answer has at most "
            f"{rows.max_answer_length} tokens. Contexts that do not fit into {rows.max_length} tokens beside the question are read in "
            f"several rows, which share {_stride(rows)} tokens, but at most half of what fits."
        ]
        if self.null_threshold is not None:
            lines.append(
                "A question has no answer if the score of [CLS] exceeds that of the best answer by more than "
                f"{self.null_threshold:.4f}, which gave the best F1 on the validation rows."
            )
        return lines


def _stride(rows: RowOptions) -> int:
    return STRIDE if rows.doc_stride is None else rows.doc_stride


def _texts(found: Sequence[Candidates], data: QuestionAnsweringData) -> list[str]:
    """The best answer to each question, "" if there is none."""
    return [
        data.contexts[i][each.spans[0].start : each.spans[0].stop] if each.spans else "" for i, each in enumerate(found)
    ]
