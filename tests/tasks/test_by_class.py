"""Precision, recall, F1 and the confusion matrix of each class, and its picture."""

import numpy as np
import pytest

from jaxpeft.report.confusion import plot_confusion
from jaxpeft.tasks.by_class import by_class


def test_by_hand():
    """Class a: 3 rows, 2 found. Class b: 1 row, found, and one row of a taken for it. Class c: no row."""
    found = by_class(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), ["a", "b", "c"])
    a, b, c = found.classes
    assert (a.rows, a.predicted, a.precision, a.recall) == (3, 2, 1.0, pytest.approx(2 / 3))
    assert (b.rows, b.predicted, b.precision, b.recall, b.f1) == (1, 2, 0.5, 1.0, pytest.approx(2 / 3))
    assert (c.rows, c.predicted, c.precision, c.recall, c.f1) == (0, 0, 0.0, 0.0, 0.0)
    assert found.confusion == ((2, 1, 0), (0, 1, 0), (0, 0, 0))
    assert b.cells() == ("b", "1", "2", "0.5000", "1.0000", "0.6667")


def test_many_classes_have_no_matrix():
    labels = np.arange(200)
    found = by_class(labels, labels, [str(i) for i in labels])
    assert len(found.classes) == 200
    assert found.confusion is None


@pytest.mark.parametrize("number", [2, 30, 60])
def test_the_picture_is_drawn_for_any_number_of_classes(number, tmp_path):
    confusion = np.random.default_rng(0).integers(0, 9, (number, number)).tolist()
    names = [f"a class with a rather long name, $ {i}$" for i in range(number)]
    path = plot_confusion(confusion, names, tmp_path / "confusion.png", "a run")
    assert path.read_bytes().startswith(b"\x89PNG")
