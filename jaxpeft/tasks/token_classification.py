"""Token classification: one class for each word of a sentence, such as its part of speech, or its place in the name of an entity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import ReadOptions, Split, Splits, Tables, read_file
from jaxpeft.data.classification import cap_buckets
from jaxpeft.data.conll import read_tagged_file
from jaxpeft.data.tag_schemes import OUTSIDE, has_scheme
from jaxpeft.data.tagged import tagged_splits, words_to_answer
from jaxpeft.data.token_classification import DOC_STRIDE, TokenData, token_data
from jaxpeft.data.words import Splitter
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Batch, Questions, Task
from jaxpeft.tasks.by_class import ByClass, by_class
from jaxpeft.tasks.entities import entities_by_type, entities_of, entity_scores
from jaxpeft.tasks.metrics import without_warnings
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline


@dataclass(frozen=True)
class Span:
    """A part of a text with a type.

    Attributes:
        type: the entity's type or, if tags mark no entities, the tag of a word.
        text: the part itself.
        start: its first character, from 0. In a list of words, characters are counted in the words joined by single blanks.
        end: the character behind its last one.
        probability: the mean of the probabilities of its words' tags.
    """

    type: str
    text: str
    start: int
    end: int
    probability: float


@dataclass(frozen=True)
class TaggedText:
    """The answer to a text: its words with their tags, and the spans that these mark."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class TokenClassification(Task):
    """Predicts one of `num_labels` tags for each word, at its first token. Logits are `[rows, tokens, num_labels]`.

    This class is for tags that stand for themselves. `EntityRecognition` is for those that mark entities.
    """

    name = "token-classification"
    title = "token classification"
    head = "token-classification"
    pipeline_tag = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    known_metrics = ("loss", "accuracy", "f1", "precision", "recall")
    reported_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    reads_pairs = False
    ranks_answers = False
    label_flags = ("label_names", "drop_unlabelled")
    own_flags = ("doc_stride",)
    example = "George Washington was born in Virginia."

    read_file = staticmethod(read_tagged_file)

    @classmethod
    def read_question_file(cls, path: str, *, alike: bool, **options: Any) -> Any:
        """As `read_file`, but a .txt file has one text per line, unless the training file was a .txt file too."""
        return cls.read_file(path, **options) if alike or not path.lower().endswith(".txt") else read_file(path)

    @classmethod
    def read(cls, tables: Tables, options: ReadOptions) -> Splits:
        """A list of words and one of their tags in each row."""
        return tagged_splits(tables, options)

    @classmethod
    def read_questions(cls, table: Any, where: str, options: ReadOptions) -> Split:
        """A list of words, or a text, in each row."""
        return words_to_answer(table, where, options)

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> TokenClassification:
        """The classification with `num_labels` tags."""
        return cls(num_labels, cls.reported_metrics)

    def with_names(self, label_names: Sequence[str] | None) -> TokenClassification:
        """The task for tags of these names: `EntityRecognition` if they mark entities."""
        kind = EntityRecognition if has_scheme(label_names or ()) else TokenClassification
        return kind.for_labels(self.num_labels)

    def metric_title(self, name: str, label_names: Sequence[str] | None) -> str:
        """The metric's name. F1 is the mean over the tags, and accuracy that of words."""
        titles = {"f1": "F1 (macro mean of tags)", "accuracy": "word accuracy"}
        return titles.get(name) or super().metric_title(name, label_names)

    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> TokenData:
        """One row per sentence, or several overlapping ones if it is long, batched by length.

        Raises:
            InputError: the tokenizer drops all words, or `data.doc_stride` does not fit into a row.
        """
        data = self._rows(split, pipeline, batch_size=batch_size, seed=seed)
        if not len(data.labels):
            raise InputError(
                f"the tokenizer drops every word of the {len(split)} sentences; give words of its alphabet"
            )
        return data

    def _rows(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> TokenData:
        rows = pipeline.rows
        return token_data(
            split.texts,
            split.labels,
            pipeline.tokenizer,
            max_length=rows.max_length,
            batch_size=batch_size,
            seed=seed,
            doc_stride=rows.doc_stride,
            bucket_lengths=rows.bucket_lengths,
            label_names=pipeline.label_names,
            cache=rows.token_cache,
        )

    def make_questions(self, split: Split, pipeline: TextPipeline, *, batch_size: int, top: int | None) -> Questions:
        """The batches of an evaluation. An answer is a `TaggedText`; `top` means nothing, because a word has one tag.

        A text is separated into words by the tokenizer (`Splitter`), a list of words is taken as it is.
        """
        pipeline.check(split)
        splitter = Splitter.of(pipeline.tokenizer)
        texts = [_Words.of(text, splitter) for text in split.texts]
        words = [list(each.words) for each in texts]
        names = pipeline.label_names or tuple(str(i) for i in range(self.num_labels or 0))
        data = self._rows(Split(words), pipeline, batch_size=batch_size, seed=0)
        batches = list(data.eval_batches())

        def answers(outputs: Iterable[np.ndarray]) -> list[Any]:
            tags = np.full(sum(map(len, words)), OUTSIDE, object)
            probabilities = np.ones(len(tags))  # a word without tokens is surely outside
            for logits, batch in zip(outputs, batches, strict=True):
                row, column = np.nonzero(batch["weights"])
                places = data.places(batch["rows"][row], column)
                chances = _softmax(logits[row, column])
                tags[places] = np.asarray(names, object)[chances.argmax(-1)]
                probabilities[places] = chances.max(-1)
            ends = np.cumsum([0, *map(len, words)]).tolist()
            return [
                self._answer(text, tags[start:stop].tolist(), probabilities[start:stop])
                for text, (start, stop) in zip(texts, pairwise(ends), strict=True)
            ]

        return Questions(batches, answers)

    def _answer(self, text: _Words, tags: list[str], probabilities: np.ndarray) -> TaggedText:
        spans = (
            Span(kind, text.text[start:end], start, end, float(probabilities[first : last + 1].mean()))
            for kind, first, last in self.spans(tags)
            for start, end in [(text.places[first][0], text.places[last][1])]
        )
        return TaggedText(text.words, tuple(tags), tuple(spans))

    def spans(self, tags: Sequence[str]) -> list[tuple[str, int, int]]:
        """The spans that the tags of a sentence mark: type, first and last word. Here each word is one."""
        return [(tag, i, i) for i, tag in enumerate(tags)]

    def in_words(self, answer: TaggedText) -> list[str]:
        """The words with their tags, in a line."""
        return [" ".join(f"{word}/{tag}" for word, tag in zip(answer.words, answer.tags, strict=True)) or "no words"]

    def as_record(self, answer: TaggedText) -> dict[str, Any]:
        """`spans`, each with `type`, `text`, `start`, `end` and `probability`; and the `words` with their `tags`."""
        return {
            "spans": [asdict(span) for span in answer.spans],
            "words": list(answer.words),
            "tags": list(answer.tags),
        }

    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> None:
        """None: the head reads all tokens."""
        return None

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy in nats, `[rows, tokens]`."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

    def outputs(self, logits: jax.Array) -> jax.Array:
        """The most likely tag of every token, `[rows, tokens]` int32."""
        return logits.argmax(-1).astype(jnp.int32)

    def gathered(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """The tokens at which words have their labels: row, column and predicted tag, `[n, 3]` int; and the true tags, `[n]`."""
        row, column = np.nonzero(batch["weights"])
        found = [batch["rows"][row], column, outputs[row, column]]
        return np.stack(found, axis=-1), np.asarray(batch["labels"])[row, column]

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss` per word, and the metrics of all words, also of those that the tokenizer drops."""
        assert outputs is not None
        predicted = predicted_tags(outputs, data)
        return {"loss": sums["loss"] / sums["weight"], **self.scores(predicted, data)}

    def scores(self, predicted: np.ndarray, data: TokenData) -> dict[str, float]:
        """The metrics, from the `predicted` class ids of all words, `[words]`; -1 is the answer O if it is no class."""
        from sklearn.metrics import f1_score

        present = np.unique(np.concatenate([data.tags, predicted[predicted >= 0]]))
        with without_warnings():
            macro = f1_score(data.tags, predicted, labels=present, average="macro", zero_division=0.0)
        return {"accuracy": accuracy(predicted, data), "f1": float(macro)}

    def by_class(
        self, outputs: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None, data: Any = None
    ) -> ByClass | None:
        """Precision, recall and F1 of each tag, counted in words, and the confusion matrix."""
        return by_class(predicted_tags(outputs, data), data.tags, names_of(data, self.num_labels))

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of token ids, mask, types, labels and weights, all `[batch_size, length]`."""
        ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        weights = jax.ShapeDtypeStruct((batch_size, length), jnp.float32)
        return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "labels": ids, "weights": weights}

    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """The bucket lengths, up to `rows.max_length`."""
        return cap_buckets(rows.bucket_lengths, rows.max_length)

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python that print each word with its tag, which is at the word's first token."""
        return [
            "tokenizer = AutoTokenizer.from_pretrained(base, add_prefix_space=True)  # a blank before each word",
            f"words = {_separated(sentence)!r}",
            'inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")',
            "ids = model(**inputs).logits[0].argmax(-1).tolist()",
            "first = [inputs.word_to_tokens(i).start for i in range(len(words))]",
            "print([(word, model.config.id2label[ids[i]]) for word, i in zip(words, first)])",
        ]

    def notes(self, rows: RowOptions) -> list[str]:
        """The place of a word's label, and what becomes of long sentences."""
        stride = DOC_STRIDE if rows.doc_stride is None else rows.doc_stride
        return [
            "A word's tag is the one at its first token; the other tokens have no label.",
            f"Sentences of more than {rows.max_length} tokens are read in windows that share {stride} tokens (at most half of a window by "
            "default). The tag of a word comes from the window in which it has most tokens around it.",
        ]


@dataclass(frozen=True)
class EntityRecognition(TokenClassification):
    """Token classification whose tags mark entities, by a scheme such as IOB2. Whole entities are counted."""

    reported_metrics = ("f1", "precision", "recall", "accuracy")

    def metric_title(self, name: str, label_names: Sequence[str] | None) -> str:
        """The metric's name: of entities, except for the accuracy."""
        titles = {"f1": "entity F1", "precision": "entity precision", "recall": "entity recall"}
        return titles.get(name) or super().metric_title(name, label_names)

    def spans(self, tags: Sequence[str]) -> list[tuple[str, int, int]]:
        """The entities, as seqeval reads them in its default mode."""
        return entities_of(tags)

    def in_words(self, answer: TaggedText) -> list[str]:
        """A line for each entity."""
        return [
            f"{span.type} '{span.text}' ({span.start} to {span.end}) {100 * span.probability:.1f} %"
            for span in answer.spans
        ] or ["no entities"]

    def scores(self, predicted: np.ndarray, data: TokenData) -> dict[str, float]:
        """seqeval's precision, recall and F1 of entities (micro, default mode), and the accuracy of words."""
        precision, recall, f1 = entity_scores(*_named(predicted, data))
        return {"f1": f1, "precision": precision, "recall": recall, "accuracy": accuracy(predicted, data)}

    def by_class(
        self, outputs: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None, data: Any = None
    ) -> ByClass | None:
        """Precision, recall and F1 of each type, counted in entities. Entities have no confusion matrix."""
        return ByClass(entities_by_type(*_named(predicted_tags(outputs, data), data)), None)

    def notes(self, rows: RowOptions) -> list[str]:
        """The definition of the figures, and those of every token classification."""
        return [
            "Entities are counted by seqeval in its default mode, which is that of the CoNLL script: an entity is right if its words and "
            "its type are; a tag that cannot continue an entity begins a new one. Figures of single classes are those of the types, and "
            "their rows are entities.",
            *super().notes(rows),
        ]


@dataclass(frozen=True)
class _Words:
    """A text, its words, and their places in it."""

    text: str
    words: tuple[str, ...]
    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, text: str | Sequence[str], splitter: Splitter) -> _Words:
        if isinstance(text, str):
            places = splitter.words(text)
            return cls(text, tuple(text[start:stop] for start, stop in places), tuple(places))
        starts = np.cumsum([0, *(len(word) + 1 for word in text)]).tolist()
        spans = tuple((start, start + len(word)) for start, word in zip(starts, text, strict=False))
        return cls(" ".join(text), tuple(text), spans)


def predicted_tags(outputs: np.ndarray, data: TokenData) -> np.ndarray:
    """The predicted class id of every word of `data`, `[words]`, from all outputs; the id of O, or -1, for a word without tokens."""
    names = data.label_names or ()
    predicted = np.full(len(data.tags), names.index(OUTSIDE) if OUTSIDE in names else -1, np.int64)
    row, column, tag = outputs.T
    predicted[data.places(row, column)] = tag
    return predicted


def accuracy(predicted: np.ndarray, data: TokenData) -> float:
    """The share of all words whose tag is right."""
    return float((predicted == data.tags).mean())


def names_of(data: TokenData, num_labels: int | None) -> Sequence[str]:
    """The names of the classes, or their ids as text."""
    return data.label_names or [str(i) for i in range(num_labels or 0)]


def _named(predicted: np.ndarray, data: TokenData) -> tuple[list[list[str]], list[list[str]]]:
    """The true and the predicted tags of every sentence, by name."""
    names = np.asarray([*(data.label_names or ()), OUTSIDE], object)  # the last one is that of -1
    true, found = (data.sentences(names[ids]) for ids in (data.tags, predicted))
    return [each.tolist() for each in true], [each.tolist() for each in found]


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def _separated(sentence: str) -> list[str]:
    """The example's words, with its last full stop as one of them."""
    return sentence.removesuffix(".").split() + ["."] * sentence.endswith(".")
