"""Classification: one class for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import ClassificationData, Split, Splits, classification_data
from jaxpeft.data.classification import cap_buckets
from jaxpeft.errors import InputError
from jaxpeft.tasks import TASKS
from jaxpeft.tasks.base import Answers, Batch, Questions, Take, Task, in_percent, most_likely
from jaxpeft.tasks.by_class import ByClass, by_class
from jaxpeft.tasks.class_loss import ClassWeights, cross_entropy, weights_of_classes
from jaxpeft.tasks.metrics import get_metric
from jaxpeft.tasks.text_pipeline import RowOptions, TextPipeline


@dataclass(frozen=True)
class Classification(Task):
    """Predicts one of `num_labels` classes for each text. Logits are `[texts, num_labels]`.

    Attributes:
        label_smoothing: the share of a label that training spreads over all classes.
        class_weights: the weight of each class in training, in the order of the ids; None: 1 for all.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    name = "classification"
    title = "classification"
    head = "classification"
    pipeline_tag = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    known_metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "f1", "matthews", "pearson", "spearman")
    reported_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    can_pack = True
    weighs_classes = True
    problem_type = "single_label_classification"

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The classification with `num_labels` classes. One class means that the labels are numbers, so it is a regression.

        Raises:
            InputError: the labels are numbers, and this is a task that builds on classification.
        """
        if num_labels == 1 and cls is not Classification:
            raise InputError(f"task {cls.name} needs classes, and the labels are numbers: give task classification")
        if num_labels == 1:
            return TASKS["regression"].for_labels(1)
        # Accuracy and F1 are always measured, so that any two runs can be compared; of two classes also CoLA's metric.
        of_two = ("matthews",) if num_labels == 2 else ()
        return cls(num_labels, tuple(dict.fromkeys([*headline_metrics, *cls.reported_metrics, *of_two])))

    def for_training(
        self, splits: Splits, *, label_smoothing: float = 0.0, class_weights: ClassWeights | None = None
    ) -> Self:
        """The task with smoothed labels and weighted classes in training."""
        if not self.weighs_classes:
            return super().for_training(splits, label_smoothing=label_smoothing, class_weights=class_weights)
        weights = None
        if class_weights is not None:
            assert splits.train.labels is not None
            weights = weights_of_classes(class_weights, splits.train.labels, self._names(splits.label_names))
        return replace(self, label_smoothing=label_smoothing, class_weights=weights)

    def loss_options(self, label_names: Sequence[str] | None) -> dict[str, Any]:
        """`label_smoothing`, and `class_weights` by name, without those that change nothing."""
        found: dict[str, Any] = {"label_smoothing": self.label_smoothing} if self.label_smoothing else {}
        if self.class_weights is not None:
            found["class_weights"] = dict(zip(self._names(label_names), self.class_weights, strict=True))
        return found

    def _names(self, label_names: Sequence[str] | None) -> Sequence[str]:
        return label_names or [str(i) for i in range(self.num_labels or 0)]

    def metric_title(self, name: str, label_names: Sequence[str] | None) -> str:
        """The metric's name. F1 is that of the class with id 1 if there are two, else the mean over the classes."""
        if name != "f1" or self.num_labels is None:
            return super().metric_title(name, label_names)
        return f"F1 of '{(label_names or ('0', '1'))[1]}'" if self.num_labels == 2 else "F1 (macro mean)"

    def make_data(self, split: Split, pipeline: TextPipeline, *, batch_size: int, seed: int) -> ClassificationData:
        """One row per text, batched by length."""
        rows = pipeline.rows
        return classification_data(
            split.texts,
            split.pairs,
            split.labels,
            pipeline.tokenizer,
            max_length=rows.max_length,
            batch_size=batch_size,
            seed=seed,
            bucket_lengths=rows.bucket_lengths,
            cache=rows.token_cache,
        )

    def make_questions(self, split: Split, pipeline: TextPipeline, *, batch_size: int, top: int | None) -> Questions:
        """The batches of an evaluation. An answer has the `top` most likely labels with their probabilities."""
        pipeline.check(split)
        data = self.make_data(replace(split, labels=None), pipeline, batch_size=batch_size, seed=0)
        batches = list(data.eval_batches())

        def answers(outputs: Iterable[np.ndarray]) -> list[Any]:
            rows, logits = np.concatenate([batch["rows"] for batch in batches]), np.concatenate(list(outputs))
            in_order = logits[rows >= 0][np.argsort(rows[rows >= 0])]
            return self.answers(in_order, pipeline.label_names, top)

        return Questions(batches, answers, data.num_truncated)

    def answers(self, logits: np.ndarray, label_names: Sequence[str] | None, top: int | None) -> list[Any]:
        """The `top` most likely labels for every text, from `logits: [texts, classes]`."""
        names = label_names or [str(i) for i in range(logits.shape[-1])]
        return [most_likely(row, lambda ids: [names[i] for i in ids], top) for row in logits]

    def in_words(self, answer: Answers) -> list[str]:
        """The labels in a line, most likely first."""
        return [in_percent(answer)]

    def as_record(self, answer: Answers) -> dict[str, Any]:
        """The most likely `label`, its `probability`, and all `probabilities` by name."""
        (label, probability), *_ = answer
        return {"label": label, "probability": probability, "probabilities": dict(answer)}

    def tokens_read(self, batch: Batch, virtual_tokens: int = 0) -> Take:
        """Takes the first token of every text, as the classifiers of transformers' encoders do.

        With virtual tokens this is a virtual one, as in PEFT.
        """
        return partial(take_starts, starts=batch["starts"]) if "starts" in batch else lambda x: x[:, :1]

    def places_read(self, batch: Batch, virtual_tokens: int = 0) -> jax.Array:
        """The first token of every row or, in packed rows, of every text."""
        return batch["starts"] if "starts" in batch else jnp.zeros((len(batch["input_ids"]), 1), jnp.int32)

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """Cross-entropy in nats, `[texts]`."""
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

    def training_loss(self, logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The two sums of the cross-entropy with smoothed labels and weighted classes, if the task has such options."""
        if not self.label_smoothing and self.class_weights is None:
            return self.loss(logits, batch)
        smoothing, weights = self.label_smoothing, self.class_weights
        return cross_entropy(logits, batch["labels"], batch["weights"], smoothing=smoothing, class_weights=weights)

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss` and the metrics, from the logits `outputs: [texts, num_labels]` and `labels: [texts]`."""
        loss = sums["loss"] / sums["weight"]
        return {"loss": loss, **{name: get_metric(name).compute(outputs, labels) for name in self.metrics}}

    def by_class(
        self, outputs: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None, data: Any = None
    ) -> ByClass | None:
        """Precision, recall, F1 and the confusion matrix, from the logits `outputs: [texts, num_labels]`."""
        names = label_names or [str(i) for i in range(outputs.shape[-1])]
        return by_class(outputs.argmax(-1), labels, names)

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of token ids, mask and types, `[batch_size, length]`, and of `labels` and `weights`, `[batch_size]`."""
        ids = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)
        labels = jax.ShapeDtypeStruct((batch_size,), self._label_dtype)
        weights = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
        return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "labels": labels, "weights": weights}

    @property
    def _label_dtype(self) -> Any:
        return jnp.int32

    def lengths(self, rows: RowOptions) -> tuple[int, ...]:
        """The bucket lengths, up to `rows.max_length`."""
        return cap_buckets(rows.bucket_lengths, rows.max_length)


def take_starts(x: jax.Array, starts: jax.Array) -> jax.Array:
    """Take `x: [rows, seq, d]` at the first tokens of packed texts, `starts: [devices, texts / devices]`: `[texts, 1, d]`.

    Each device has its share of the rows and of the texts. `starts` counts tokens within a share, so no token is sent between
    devices.
    """
    shares = x.reshape(len(starts), -1, x.shape[-1])
    return jnp.take_along_axis(shares, starts[..., None], axis=1).reshape(-1, 1, x.shape[-1])
