"""The interface of a task, which every file in this folder implements.

A task defines its rows, the tokens that its head reads, its loss, its metrics and the form of an answer. It depends on no
model and no adapter: `jaxpeft.training.objective.Objective` joins the three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.data import (
    ReadFile,
    ReadOptions,
    Split,
    Splits,
    Tables,
    classes_or_numbers,
    read_file,
    text_splits,
    texts_to_answer,
)
from jaxpeft.errors import InputError
from jaxpeft.tasks.by_class import ByClass
from jaxpeft.tasks.class_loss import ClassWeights
from jaxpeft.tasks.metrics import get_metric
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline

Batch = Mapping[str, Any]
"""Arrays of one micro-step with the batch as first axis: token ids and mask, labels, weights. Labels of weight 0 do not count."""

Answers = list[tuple[str, float]]
"""Tokens or labels with their probabilities, most likely first."""

Take = Callable[[jax.Array], jax.Array]
"""`[rows, length, d]` → `[rows, tokens, d]`: takes the tokens that a head reads."""


class RowError(InputError):
    """A text that a task cannot answer. `row` is its number, from 0."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def for_device(batch: Batch) -> dict[str, Any]:
    """The arrays of `batch` that a program reads: all but `rows`, by which the host restores the order."""
    return {key: value for key, value in batch.items() if key != "rows"}


@dataclass(frozen=True)
class Questions:
    """A user's own texts, and how to answer them.

    Attributes:
        batches: batches of the texts, without labels.
        answers: makes the answers, one for each text in the order of the texts, of the logits of all batches in their order.
        num_truncated: number of texts that were cut to the run's `max_length`.
    """

    batches: Sequence[Batch]
    answers: Callable[[Iterable[np.ndarray]], list[Any]]
    num_truncated: int = 0


@dataclass(frozen=True)
class Task(ABC):
    """A task for one kind of labels.

    Attributes:
        num_labels: number of classes; 1: the labels are numbers; None: no labels.
        metrics: the metrics to measure besides the loss. The first one selects the best adapter.
    """

    num_labels: int | None = None
    metrics: tuple[str, ...] = ()

    name: ClassVar[str]
    """The value of `--task`."""
    title: ClassVar[str]
    """The task in prose, such as "masked language modelling"."""
    head: ClassVar[str]
    """The kind of transformers model that it needs: a key of `jaxpeft.models.heads.HEADS`."""
    pipeline_tag: ClassVar[str]
    """The name of the task on the Hugging Face hub."""
    auto_class: ClassVar[str]
    """The torch class that loads such a model, for the code in the model card."""
    known_metrics: ClassVar[tuple[str, ...]]
    """All valid values of `training.metric`."""
    reported_metrics: ClassVar[tuple[str, ...]]
    """The metrics of a comparison's report, the deciding one first."""
    reads_labels: ClassVar[bool] = True
    """True if the data must have labels."""
    label_flags: ClassVar[tuple[str, ...]] = ("label_names", "num_labels", "regression", "drop_unlabelled")
    """The flags of the data that say what labels are, among those that it can use if it reads labels."""
    own_flags: ClassVar[tuple[str, ...]] = ()
    """Flags of `data` that are only for tasks that name them here."""
    problem_type: ClassVar[str | None] = None
    """transformers' `problem_type` in the config of an exported model: the loss with which torch would train on; None: the base's."""
    has_classes: ClassVar[bool] = True
    """True if `num_labels` is a number of classes."""
    reads_pairs: ClassVar[bool] = True
    """True if a row may have two texts."""
    can_pack: ClassVar[bool] = False
    """True if several texts may share a training row."""
    trains_head: ClassVar[bool] = True
    """True if the head is always fully trained, as in PEFT's sequence classifiers. Else it is trained only if the checkpoint lacks it."""
    ranks_answers: ClassVar[bool] = True
    """True if a text has several answers, of which the most likely ones are given."""
    fills_masks: ClassVar[bool] = False
    """True if an answer fills the masks of a text."""
    weighs_classes: ClassVar[bool] = False
    """True if its training can smooth labels and weight classes."""
    has_head: ClassVar[bool] = True
    """False if the outputs of the encoder itself are used, so that there is no head to train."""
    compares_rows: ClassVar[bool] = False
    """True if the loss compares the rows of a batch with each other, so that it is no sum over rows.

    Its gradients are then cached between the passes of a batch (`jaxpeft.training.micro_batches`)."""
    reads_scores: ClassVar[bool] = False
    """True if the data may have labels that are numbers, and need not have any."""
    reads_negatives: ClassVar[bool] = False
    """True if a row may have a third text, which does not belong to the first."""
    answers_single_texts: ClassVar[bool] = False
    """True if a run on pairs also answers single texts. Then the second column of a file to answer must be named."""
    options_from: ClassVar[str | None] = None
    """The section of the configuration that holds the task's own flags, or None. They are attributes of the task."""
    example: ClassVar[str] = "This is a great movie!"
    """A text for trying a finished run."""
    example_pair: ClassVar[str] = "I enjoyed this film."
    """The second text, if the run reads pairs."""

    read_file: ClassVar[ReadFile] = staticmethod(read_file)
    """Reads one file of the task's data as a table."""

    @classmethod
    def read_question_file(cls, path: str, *, alike: bool, **options: Any) -> Any:
        """Reads one file to answer as a table. `alike` is True if it has the suffix of the training file, as is then true of `options`."""
        return cls.read_file(path, **options)

    @classmethod
    def read(cls, tables: Tables, options: ReadOptions) -> Splits:
        """The rows of a dataset: a text in each, maybe a second one, and a label if the task reads labels.

        Raises:
            InputError: a column does not exist, or a row cannot be read.
        """
        return text_splits(tables, options, classes_or_numbers if cls.reads_labels else None)

    @classmethod
    def read_questions(cls, table: Any, where: str, options: ReadOptions) -> Split:
        """The rows of a table to answer, without labels. `where` is its file, for messages. Errors are as in `read`."""
        return texts_to_answer(table, where, options)

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The task for data with `num_labels`. `headline_metrics` are the metrics that a benchmark's authors report, if any."""
        return cls(num_labels, tuple(headline_metrics) or cls.reported_metrics)

    def with_names(self, label_names: Sequence[str] | None) -> Task:
        """The task for classes of these names, in the order of their ids, if names decide how it is measured. Else the task itself."""
        return self

    def configured(self, options: Mapping[str, Any], splits: Splits | None = None) -> Self:
        """The task with its own flags (`options_from`), for the rows in `splits` if they are given."""
        return replace(self, **options)

    def check_data(self, splits: Splits) -> None:
        """Raise InputError if the rows in `splits` do not fit this task."""
        if self.reads_labels and splits.num_labels is None:
            raise InputError(
                f"{self.name} needs labels, and {splits.source} has none; name their column with data.label_column"
            )

    def for_splits(self, splits: Splits) -> Self:
        """The task for the rows in `splits`, without the metrics that have no value for them."""
        return self

    def data_notes(self, splits: Splits) -> list[str]:
        """One line for each thing that a reader of the metrics should know of the rows in `splits`."""
        return []

    def for_training(
        self, splits: Splits, *, label_smoothing: float = 0.0, class_weights: ClassWeights | None = None
    ) -> Self:
        """The task whose `training_loss` has these options, for the rows in `splits`. The losses that are reported do not change.

        Raises:
            InputError: the task has no such options, or they do not fit its classes.
        """
        given = "label_smoothing" if label_smoothing else "class_weights" if class_weights is not None else None
        if given:
            raise InputError(
                f"training.{given} is for tasks that choose one class for a text, and this is {self.title}; leave it out"
            )
        return self

    def loss_options(self, label_names: Sequence[str] | None) -> dict[str, Any]:
        """The options of `for_training` that are in use, by name, for the log and the results. Arguments are as in `metric_title`."""
        return {}

    def check_metric(self, metric: str | None) -> None:
        """Raise InputError if `metric`, the value of `training.metric`, is not measured on this data."""
        measured = dict.fromkeys(["loss", *self.metrics])
        if metric and metric not in measured:
            number = self.num_labels if self.has_classes else None
            classes = f" with {number} classes" if number and number > 1 else ""
            raise InputError(
                f"training.metric '{metric}' is not measured in this {self.title}{classes}; choose from {', '.join(measured)}"
            )

    def metric_title(self, name: str, label_names: Sequence[str] | None) -> str:
        """The metric's name for readers. `label_names` are the classes' names in the order of their ids, if they have any."""
        return get_metric(name).title

    @abstractmethod
    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> Any:
        """Tokenise `split` into batches of `batch_size` rows. `seed` decides the order of training.

        The result has the methods of `jaxpeft.training.input_pipeline.Data`, and `eval_batches()`.
        """

    @abstractmethod
    def make_questions(self, split: Split, pipeline: TextPipeline, *, batch_size: int, top: int | None) -> Questions:
        """The texts of `split` as questions, in the rows that training and evaluation would make of them. Labels are not read.

        Args:
            split: the texts, and their pairs if the run reads pairs.
            pipeline: the run's own.
            batch_size: rows per batch.
            top: the number of answers per text or mask; None: all of them.

        Raises:
            InputError: the task cannot answer one of the texts, or a text is too long to be answered.
        """

    @abstractmethod
    def in_words(self, answer: Any) -> list[str]:
        """An answer of `make_questions` for the terminal, a line for each of its parts."""

    @abstractmethod
    def as_record(self, answer: Any) -> dict[str, Any]:
        """An answer of `make_questions` as values for a line of JSON."""

    @abstractmethod
    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> Take | None:
        """A function that takes the tokens of `batch` that the head reads, or None if it reads all of them.

        `virtual_tokens` is the number of tokens that a method puts in front of every row.
        """

    def places_read(self, batch: Batch, virtual_tokens: int = 0) -> jax.Array | None:
        """The places of the tokens that `tokens_read` takes, int32 `[shares, n]`; None if the head reads all tokens.

        The batch's tokens are divided into equal shares, usually one for each row, and places count within a share.
        """
        return None

    def read_out(self, outputs: jax.Array, batch: Batch, virtual_tokens: int = 0) -> jax.Array:
        """The logits, from the head's outputs in fp32: by default these themselves, without those of virtual tokens.

        Args:
            outputs: `[rows, …]`; if there are outputs for all tokens, `[rows, virtual_tokens + length, …]`.
            batch: the batch.
            virtual_tokens: number of outputs in front of every row that belong to no token of the batch.
        """
        return outputs[:, virtual_tokens:] if virtual_tokens else outputs

    @abstractmethod
    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The loss of every label, shaped like `batch["labels"]`."""

    def loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The sum of the weighted losses and the sum of the weights, in fp32.

        The caller divides the sums, so batches of unequal weight add up exactly, and a weight of 0 is safe.
        """
        weights = batch["weights"]
        return (self.losses(logits, batch) * weights).sum(), weights.sum()

    def training_loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The two sums of `loss` that training minimises. They may differ from those that are reported."""
        return self.loss(logits, batch)

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Sums over a batch from which metrics are computed: `loss`, `weight` and `correct`."""
        total, weight = self.loss(logits, batch)
        right = logits.argmax(-1) == batch["labels"]
        return {"loss": total, "weight": weight, "correct": jnp.where(right, batch["weights"], 0.0).sum()}

    def outputs(self, logits: jax.Array) -> jax.Array | None:
        """The part of `logits` that the host needs for the metrics, or None if the statistics suffice."""
        return logits

    def gathered(self, outputs: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """What `measure` needs of the `outputs` of a batch, and its labels, `[n, …]` each. Batches are joined on the first axis.

        By default these are the rows with a weight. If rows have different lengths, both are arrays of objects.
        """
        real = np.asarray(batch["weights"]) > 0
        return outputs[real], np.asarray(batch["labels"])[real]

    @abstractmethod
    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """Compute `loss` and the metrics of a data set.

        Args:
            sums: the statistics, summed over all batches.
            outputs: those of all batches, as `gathered` gives them; None if the task has none.
            labels: the labels to them; None if the task has no `outputs`.
            data: the data set, as `make_data` made it, for tasks whose metrics need the texts.
        """

    def by_class(
        self, outputs: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None, data: Any = None
    ) -> ByClass | None:
        """The figures of each class, from the same arguments as `measure`; None if the task has no classes."""
        return None

    def calibrated(self, outputs: np.ndarray, labels: np.ndarray, data: Any = None) -> Self:
        """The task with the thresholds that are best for these `outputs`, those of the validation rows; arguments are as in `measure`."""
        return self

    @property
    def calibration(self) -> dict[str, Any]:
        """The attributes that `calibrated` sets, by name. A run keeps them in its results."""
        return {}

    def with_calibration(self, calibration: Mapping[str, Any]) -> Self:
        """The task with the attributes that a finished run has kept."""
        return replace(self, **calibration)

    def evaluated(self, data: Any, most: int | None) -> Any:
        """The rows of `data` to evaluate: all of them or, if `most` is given, at most so many batches, which are always the same."""
        return data.sample(most * data.batch_size) if most else data

    def single_mask_batches(self, data: Any, num_rows: int) -> Iterable[Batch] | None:
        """Batches for pseudo-perplexity on `num_rows` rows; None if the task has no such figure."""
        return None

    @abstractmethod
    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of an evaluation batch of `batch_size` rows of `length` tokens."""

    @abstractmethod
    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """Possible tokens per row of training batches, ascending. Each length is a program of its own."""

    def dummy_data(self, rows: RowOptions, batch_size: int, *, vocab_size: int, seed: int) -> Any | None:
        """Dummy data with the shapes of real data, or None if the shapes depend on the data."""
        return None

    def export_files(self, rows: RowOptions, width: int) -> dict[str, Any]:
        """Files that other libraries need beside the weights: relative path → its value as JSON.

        `width` is that of the encoder's outputs. If there are files, the tokenizer is put beside them.
        """
        return {}

    def in_library(self, place: str, sentence: str) -> tuple[str, list[str]] | None:
        """A library that loads the exported directory `place` by these files, and lines of Python that do so; None if there is none."""
        return None

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python for the model card that run a torch `model` and its `tokenizer` on `sentence`, and on its `pair` if the
        run reads pairs."""
        texts = repr(sentence) if pair is None else f"{sentence!r}, {pair!r}"
        return [f'inputs = tokenizer({texts}, return_tensors="pt")', "print(model(**inputs).logits.softmax(-1))"]

    def notes(self, rows: RowOptions) -> list[str]:
        """Notes for the model card on the measurement of the figures, one sentence each."""
        return []


def most_likely(logits: np.ndarray, names: Callable[[list[int]], Sequence[str]], top: int | None) -> Answers:
    """The `top` (None: all) most likely classes of `logits: [classes]`, with softmax probabilities. `names` maps ids to names."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    return list(zip(names(best.tolist()), probabilities[best].tolist(), strict=True))


def in_percent(answers: Answers) -> str:
    """`answers` in a line, with probabilities in percent."""
    return ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in answers)
