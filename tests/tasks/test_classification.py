"""Which task a number of labels makes."""

import pytest

from jaxpeft.errors import InputError
from jaxpeft.tasks import task_for
from jaxpeft.tasks.classification import Classification
from jaxpeft.tasks.regression import Regression


class Variant(Classification):
    """A task of its own that builds on classification."""

    name = "variant"


def test_one_label_is_a_regression_but_not_for_a_task_that_builds_on_classification():
    assert type(Classification.for_labels(3)) is Classification
    assert type(Classification.for_labels(1)) is Regression
    assert type(Variant.for_labels(2)) is Variant
    with pytest.raises(
        InputError, match="task variant needs classes, and the labels are numbers: give task classification"
    ):
        Variant.for_labels(1)


def test_a_task_that_does_not_exist():
    with pytest.raises(InputError, match="there is no task 'masked'; did you mean 'masked-lm'"):
        task_for("masked", None)
