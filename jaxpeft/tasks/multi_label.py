"""Multi-label classification: any number of classes for each text or pair of texts, also none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft.data import ReadOptions, Splits, Tables, encode_label_lists, text_splits, with_label_lists
from jaxpeft.errors import InputError
from jaxpeft.tasks.base import Answers, Batch, Task, in_percent
from jaxpeft.tasks.by_class import ByClass, by_class_of_many
from jaxpeft.tasks.classification import Classification
from jaxpeft.tasks.text_pipeline import RowOptions


@dataclass(frozen=True)
class ClassesOfText:
    """The classes of a text.

    Attributes:
        labels: the predicted ones, whose probability is above the threshold, most likely first.
        probabilities: classes with their probabilities, most likely first: the predicted ones, and others.
    """

    labels: tuple[str, ...]
    probabilities: Answers


@dataclass(frozen=True)
class MultiLabel(Classification):
    """Predicts for each class whether a text has it. Logits and labels are `[texts, num_labels]`; labels are 0 or 1.

    Attributes:
        threshold: the probability above which a class is predicted, the same for all classes. `calibrated` chooses it.
    """

    threshold: float = 0.5

    name = "multi-label"
    title = "multi-label classification"
    known_metrics = ("loss", "micro_f1", "macro_f1", "exact_match")
    reported_metrics = ("micro_f1", "macro_f1", "exact_match")
    weighs_classes = False
    label_flags = ("label_names", "num_labels", "drop_unlabelled", "label_columns", "label_delimiter")
    problem_type = "multi_label_classification"

    @classmethod
    def read(cls, tables: Tables, options: ReadOptions) -> Splits:
        """The rows of a dataset, with a 0 or 1 for each class as labels.

        Raises:
            InputError: as `text_splits`, `with_label_lists` and `encode_label_lists`.
        """
        return text_splits(*with_label_lists(tables, options), encode_label_lists)

    @classmethod
    def for_labels(cls, num_labels: int | None, headline_metrics: Sequence[str] = ()) -> Task:
        """The task for data with `num_labels` classes. A benchmark's own metrics are not for several classes a text."""
        return super().for_labels(num_labels)

    def check_data(self, splits: Splits) -> None:
        """Raise InputError if the data has no labels."""
        if splits.num_labels is None:
            raise InputError(
                f"{self.name} needs labels, and {splits.source} has none; name their column with data.label_column, or a column for "
                "each class with data.label_columns"
            )

    def losses(self, logits: jax.Array, batch: Batch) -> jax.Array:
        """The mean over the classes of the binary cross-entropy in nats, `[texts]`."""
        return optax.sigmoid_binary_cross_entropy(logits, batch["labels"]).mean(-1)

    def statistics(self, logits: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """`loss` and `weight`. The rest is computed from the logits."""
        total, weight = self.loss(logits, batch)
        return {"loss": total, "weight": weight}

    def measure(
        self, sums: Mapping[str, float], outputs: np.ndarray | None, labels: np.ndarray | None, data: Any = None
    ) -> dict[str, float]:
        """`loss`; F1 of all decisions together (micro) and as the mean over the classes (macro); and the share of texts with exactly
        the right classes. From `outputs` and `labels: [texts, num_labels]`, at the threshold."""
        from sklearn.metrics import accuracy_score, f1_score

        assert outputs is not None
        assert labels is not None
        predicted, right = self._predicted(outputs), labels > 0
        return {
            "loss": sums["loss"] / sums["weight"],
            "micro_f1": float(f1_score(right, predicted, average="micro", zero_division=0.0)),
            "macro_f1": float(f1_score(right, predicted, average="macro", zero_division=0.0)),
            "exact_match": float(accuracy_score(right, predicted)),
        }

    def by_class(
        self, outputs: np.ndarray, labels: np.ndarray, label_names: Sequence[str] | None, data: Any = None
    ) -> ByClass:
        """Precision, recall and F1 of each class at the threshold. There is no confusion matrix: classes do not exclude each other."""
        return by_class_of_many(self._predicted(outputs), labels > 0, self._names(label_names))

    def calibrated(self, outputs: np.ndarray, labels: np.ndarray, data: Any = None) -> Self:
        """The task with the threshold of the largest micro F1 on these `outputs` and `labels: [texts, num_labels]`."""
        return replace(self, threshold=best_threshold(probabilities(outputs), labels > 0))

    @property
    def calibration(self) -> dict[str, Any]:
        """`threshold`."""
        return {"threshold": self.threshold}

    def answers(self, logits: np.ndarray, label_names: Sequence[str] | None, top: int | None) -> list[ClassesOfText]:
        """The classes of every text, from `logits: [texts, classes]`, with at least the `top` largest probabilities."""
        names, found = self._names(label_names), []
        for row in probabilities(logits):
            order = np.argsort(-row, kind="stable")
            number = int((row > self.threshold).sum())
            shown = order[: None if top is None else max(top, number)]
            labels = tuple(names[i] for i in order[:number])
            found.append(ClassesOfText(labels, [(names[i], float(row[i])) for i in shown]))
        return found

    def in_words(self, answer: ClassesOfText) -> list[str]:  # type: ignore[override]
        """The predicted classes in a line, and others behind them in brackets."""
        number = len(answer.labels)
        predicted, others = answer.probabilities[:number], answer.probabilities[number:]
        return [(in_percent(predicted) or "no class") + (f" (not: {in_percent(others)})" if others else "")]

    def as_record(self, answer: ClassesOfText) -> dict[str, Any]:  # type: ignore[override]
        """The predicted classes as `labels`, and all `probabilities` by name."""
        return {"labels": list(answer.labels), "probabilities": dict(answer.probabilities)}

    def batch_shapes(self, rows: RowOptions, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """As in classification, but `labels` are `[batch_size, num_labels]`."""
        labels = jax.ShapeDtypeStruct((batch_size, self.num_labels or 0), jnp.float32)
        return {**super().batch_shapes(rows, batch_size, length), "labels": labels}

    def torch_lines(self, sentence: str, pair: str | None = None) -> list[str]:
        """Lines of Python that print the probability of every class."""
        *lines, _ = super().torch_lines(sentence, pair)
        return [*lines, f"print(model(**inputs).logits.sigmoid())  # a class is predicted above {self.threshold:.4g}"]

    def _predicted(self, outputs: np.ndarray) -> np.ndarray:
        return probabilities(outputs) > self.threshold


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The logistic function in double precision."""
    from scipy.special import expit

    return expit(np.asarray(logits, np.float64))


def best_threshold(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The threshold with the largest micro F1: classes whose probability is above it are predicted.

    Thresholds lie halfway between two probabilities. Of several that are equally good, it is the nearest to 0.5. Without a true
    label it is 0.5.

    Args:
        probabilities: `[texts, classes]`.
        labels: `[texts, classes]` bool.
    """
    order = np.argsort(-probabilities, axis=None, kind="stable")
    scores, right = probabilities.ravel()[order], np.cumsum(labels.ravel()[order])
    if not right[-1]:
        return 0.5
    # With the first n decisions positive, F1 is 2 · right / (n + labels). A threshold cannot lie between equal scores.
    f1 = 2 * right / (np.arange(1, len(scores) + 1) + right[-1])
    below = np.append(scores[1:], 0.0)
    candidates = (scores + below)[scores > below] / 2, f1[scores > below]
    best = np.flatnonzero(candidates[1] == candidates[1].max())
    return float(min(candidates[0][best], key=lambda threshold: abs(threshold - 0.5)))
