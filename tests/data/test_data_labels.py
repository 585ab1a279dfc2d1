import numpy as np
import pytest

from jaxpeft.data.labels import encode_labels
from jaxpeft.errors import InputError


def encode(train, validation=(), *, num_labels=None, label_names=None):
    columns = {"train": train, **({"dev": validation} if validation else {})}
    encoded, count, names = encode_labels(columns, num_labels=num_labels, label_names=label_names)
    return encoded["train"], count, names


@pytest.mark.parametrize("values", [[0, 2, 1], ["0", "2", " 1"], [0.0, "2", 1]])
def test_integers_are_ids(values):
    labels, count, names = encode(values)
    np.testing.assert_array_equal(labels, [0, 2, 1])
    assert labels.dtype == np.int32
    assert (count, names) == (3, None)


def test_names_are_sorted_or_as_given():
    assert encode(["neg", "pos", "neg"])[0].tolist() == [0, 1, 0]
    labels, count, names = encode(["neg", "pos", "neg"], label_names=["pos", "neg", "neutral"])
    assert labels.tolist() == [1, 0, 1]
    assert (count, names) == (3, ("pos", "neg", "neutral"))
    assert encode(["1", "5", "1"], label_names=["1", "5"])[0].tolist() == [0, 1, 0]


def test_fractions_are_regression_in_every_split():
    labels, count, _ = encode(["4.8", "2"], ["3"])
    assert labels.dtype == np.float32
    np.testing.assert_allclose(labels, [4.8, 2.0])
    assert count == 1
    assert encode([1, 5], num_labels=1)[0].dtype == np.float32


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0, 1, 2], {"num_labels": 2}, r"train, row 3: the label 2 is not one of the ids 0 to 1; .*num_labels"),
        ([0, -1], {}, r"train, row 2: the label -1 is not one of the ids 0 to 1"),
        ([0, 1.5], {"num_labels": 2}, r"train, row 2: the label 1.5 is not one of the ids"),
        (["a", ""], {}, r"train, row 2: the label is missing \(''\)"),
        ([0, None], {}, r"train, row 2: the label is missing \(None\)"),
        ([1.0, float("nan")], {}, r"train, row 2: the label is missing \(nan\)"),
        ([[1], [2]], {}, r"train, row 1: the label \[1\] is neither a number nor a name"),
        (["a", "b"], {"num_labels": 3}, r"num_labels is 3, but the labels are a, b"),
        ([0, 1], {"num_labels": 3, "label_names": ["a", "b"]}, r"num_labels is 3, but label_names has 2"),
        (["negative", "negativ"], {"label_names": ["negative", "positive"]}, r"row 2: .*did you mean 'negative'"),
        (["1", "x"], {"num_labels": 1}, r"row 2: the label 'x' is not a number; set num_labels above 1"),
    ],
)
def test_refusals_name_the_row_and_the_value(values, options, message):
    with pytest.raises(InputError, match=message) as error:
        encode(values, **options)
    assert "\n" not in str(error.value)


def test_validation_labels_must_be_known_from_train():
    with pytest.raises(InputError, match=r"dev, row 2: the label 'c' is unknown; known: a, b"):
        encode(["a", "b"], ["a", "c"])
    with pytest.raises(InputError, match=r"dev, row 1: the label 2 is not one of the ids 0 to 1"):
        encode([0, 1], [2])
