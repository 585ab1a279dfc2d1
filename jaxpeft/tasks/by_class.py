"""Figures of a classification class by class: precision, recall, F1, and which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxpeft.tasks.metrics import without_warnings

_MOST_CLASSES = 100
"""Classes up to which the confusion matrix is made. It has classes² entries, and nobody reads a larger one."""


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class.

    Attributes:
        name: its name, or its id as text.
        rows: rows that are of this class.
        predicted: rows that were predicted to be.
        precision: share of the predicted rows that are of this class; 0 if there are none.
        recall: share of the class's rows that were predicted to be; 0 if there are none.
        f1: the harmonic mean of both.
    """

    name: str
    rows: int
    predicted: int
    precision: float
    recall: float
    f1: float

    def cells(self) -> tuple[str, ...]:
        """The figures as text, in the order of `HEADS`."""
        return (
            self.name,
            f"{self.rows:,}",
            f"{self.predicted:,}",
            *(f"{value:.4f}" for value in (self.precision, self.recall, self.f1)),
        )


HEADS = ("class", "rows", "predicted", "precision", "recall", "F1")


@dataclass(frozen=True)
class ByClass:
    """A classification class by class.

    Attributes:
        classes: the figures of every class, in the order of the ids.
        confusion: rows by their class and by the predicted class, `[classes][classes]`; None for more than 100 classes, and if rows
            may have several.
    """

    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int, ...], ...] | None


def by_class(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ByClass:
    """The figures of `predicted` and true class ids, both `[rows]`, by the classes' `names` in the order of the ids.

    A predicted id of -1 is none of the classes.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    ids = np.arange(len(names))
    with without_warnings():
        figures = precision_recall_fscore_support(labels, predicted, labels=ids, zero_division=0.0)
        matrix = confusion_matrix(labels, predicted, labels=ids) if len(names) <= _MOST_CLASSES else None
    classes = _figures(names, np.bincount(predicted[predicted >= 0], minlength=len(names)), figures)
    return ByClass(classes, None if matrix is None else tuple(tuple(row) for row in matrix.tolist()))


def by_class_of_many(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ByClass:
    """The figures of rows with any number of classes: `predicted` and `labels` are `[rows, classes]` bool. There is no confusion matrix."""
    from sklearn.metrics import precision_recall_fscore_support

    figures = precision_recall_fscore_support(labels, predicted, zero_division=0.0)
    return ByClass(_figures(names, predicted.sum(0), figures), None)


def _figures(names: Sequence[str], predicted: np.ndarray, figures: Sequence[np.ndarray]) -> tuple[ClassFigures, ...]:
    """Of each class: its name, the number of rows that were predicted to be of it, and precision, recall, F1 and rows."""
    return tuple(
        ClassFigures(name, int(rows), int(number), float(precision), float(recall), float(f1))
        for name, number, precision, recall, f1, rows in zip(names, predicted, *figures, strict=True)
    )
