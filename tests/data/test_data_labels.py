import numpy as np
import pytest

from jaxpeft.data.labels import encode_labels
from jaxpeft.errors import InputError


def encode(train, validation=(), **options):
    found = encode_labels({"train": train, **({"dev": validation} if validation else {})}, **options)
    return found.columns["train"], found.num_labels, found.names


def ids(train, **options):
    labels, count, names = encode(train, **options)
    assert labels.dtype == np.int32
    assert count == len(names or range(count))
    return labels.tolist(), names


def notes(train, **options):
    return encode_labels({"train": train}, **options).notes


@pytest.mark.parametrize("values", [[0, 2, 1], ["0", "2", " 1"], [0.0, "2", 1], ["0.0", "2.0", "1.0"]])
def test_integers_from_zero_are_ids(values):
    assert ids(values) == ([0, 2, 1], None)


def test_names_are_sorted_or_as_given():
    assert ids(["neg", "pos", "neg"]) == ([0, 1, 0], ("neg", "pos"))
    assert ids(["neg", "pos", "neg"], label_names=["pos", "neg", "neutral"]) == ([1, 0, 1], ("pos", "neg", "neutral"))
    assert ids(["1", "5", "1"], label_names=["5", "1"]) == ([1, 0, 1], ("5", "1"))
    assert ids([0, 1, 0], label_names=["no", "yes"]) == ([0, 1, 0], ("no", "yes"))
    assert ids([True, False]) == ids(["True", "False"]) == ([1, 0], ("False", "True"))


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([1, 2, 10, 2], ("1", "2", "10")),
        (["3.0", "3", "9"], ("3", "9")),
        ([-2, -1, 0, 1, 2], ("-2", "-1", "0", "1", "2")),
        ([0, 2], ("0", "2")),
        ([10**12, 7], ("7", str(10**12))),
        (["007", "010", "7"], ("007", "010", "7")),
        (["+1", "-1"], ("+1", "-1")),
        (["1e5", "2e5"], ("1e5", "2e5")),
        (["007", "1.5"], ("007", "1.5")),
        (["0", "1", "x"], ("0", "1", "x")),
    ],
)
def test_other_whole_numbers_and_codes_are_names(values, names):
    labels, found = ids(values)
    assert found == names
    texts = [names[i] for i in labels]
    assert texts == [str(int(float(v))) if v in ("3.0",) else str(v) for v in values]


def test_fractions_are_regression_in_every_split():
    labels, count, names = encode(["4.8", "2", "1e-3", "-1", "+.5"], ["3"])
    assert (labels.dtype, count, names) == (np.float32, 1, None)
    np.testing.assert_allclose(labels, [4.8, 2.0, 1e-3, -1, 0.5])
    assert encode([1, 5, -1], num_labels=1)[0].tolist() == [1, 5, -1]
    assert encode(["007", "8"], num_labels=1)[0].tolist() == [7, 8]


BASE = ("POSITIVE", "NEGATIVE")


def test_classes_of_the_base_keep_its_ids():
    assert ids(["negative", "Positive"], base_names=BASE) == ([1, 0], BASE)
    assert ids(["positive", "positive"], base_names=BASE) == ([0, 0], BASE)
    assert ids([0, 1, 1], base_names=BASE) == ([0, 1, 1], BASE)
    # Names that say what the ids in the file mean, in another order than the base's.
    assert ids([0, 1, 1], label_names=["negative", "positive"], base_names=BASE) == ([1, 0, 0], BASE)
    assert notes(["negative", "positive"], base_names=BASE) == (
        "the classes are the base's own: 0 POSITIVE, 1 NEGATIVE",
    )


def test_other_classes_than_the_bases():
    assert ids(["ham", "spam"], base_names=BASE) == ([0, 1], ("ham", "spam"))
    assert notes(["ham", "spam"], base_names=BASE) == ("the base's own classes are others: POSITIVE, NEGATIVE",)
    assert ids(["negative", "positive", "neutral"], base_names=BASE)[1] == ("negative", "neutral", "positive")
    assert ids([0, 1, 2], base_names=BASE) == ([0, 1, 2], None)
    assert encode([0.5, 1], base_names=BASE)[1:] == (1, None)
    assert ids(["Yes", "yes"], base_names=("yes", "no"))[1] == ("Yes", "yes")


def test_a_class_without_a_row_is_said():
    assert notes(["a", "b"], label_names=["a", "b", "c"]) == ("no row of train has the class 'c'",)
    assert notes([0, 1], num_labels=4) == ("no row of train has the classes 2, 3",)
    assert notes([0, 1], num_labels=10**9)[0].endswith("21 and 999999978 more")
    assert "no row of train has the class 'NEGATIVE'" in notes(["positive"], base_names=BASE)


def test_lists_of_classes_are_said():
    assert "3 of 4 labels look like lists of classes ('a,b')" in notes(["a,b", "b", "a, c", "b;c"])[0]
    assert notes(["Food, drink", "Doctor, Who", "c"]) == ()


MISSING = [
    ("", "''"),
    (None, "None"),
    (float("nan"), "nan"),
    ("-", "'-'"),
    (" null ", "' null '"),
    (-1, "-1"),
    ("-1", "'-1'"),
]


@pytest.mark.parametrize(("value", "shown"), MISSING)
def test_a_missing_label_is_refused_with_the_way_out_or_left_out(value, shown):
    values = [1, 0, value, 1, value] if value in (-1, "-1") else ["b", "a", value, "b", value]
    message = rf"^train, row 3: the label is missing \({shown}\), as in 2 of 5 rows; .* data\.drop_unlabelled true"
    with pytest.raises(InputError, match=message):
        encode(values)
    found = encode_labels({"train": values}, drop_unlabelled=True)
    assert found.columns["train"].tolist() == [1, 0, 1]
    assert found.rows["train"].tolist() == [0, 1, 3]
    assert found.notes == ("2 of 5 rows of train have no label and are left out",)


def test_what_looks_missing_may_be_a_class():
    assert ids([-1, 0, 1], label_names=["-1", "0", "1"]) == ([0, 1, 2], ("-1", "0", "1"))
    assert ids(["-", "x"], label_names=["x", "-"]) == ([1, 0], ("x", "-"))
    with pytest.raises(InputError, match=r"if -1 is a class, list all classes in data\.label_names"):
        encode([-1, 0, 1])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([0, 1, 2], {"num_labels": 2}, r"train, row 3: the label 2 is not one of the ids 0 to 1; .*data\.num_labels"),
        ([0, 1.5], {"num_labels": 2}, r"train, row 2: the label 1.5 is not one of the ids"),
        (
            [[1], [2]],
            {},
            r"train, row 1: the label \[1\] is neither a number nor a name; give another data\.label_column",
        ),
        ([None, ""], {"drop_unlabelled": True}, r"train: none of its 2 rows has a label"),
        (["a", "b"], {"num_labels": 3}, r"data\.num_labels is 3, but the labels are a, b; .*data\.label_names"),
        ([0, 1], {"num_labels": 3, "label_names": ["a", "b"]}, r"data\.num_labels is 3, but data\.label_names has 2"),
        (["negative", "negativ"], {"label_names": ["negative", "positive"]}, r"row 2: .*did you mean 'negative'"),
        (["1", "x"], {"num_labels": 1}, r"row 2: the label 'x' is not a number; .*set data\.regression to false"),
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
    with pytest.raises(InputError, match=r"dev, row 1: the label '1000' is unknown; known: 0, 1, 2.*19 and 30 more"):
        encode([*range(49), 50], [1000])
