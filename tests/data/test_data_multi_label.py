"""Rows with several classes: every form in which files and the hub have them, and what is refused."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from jaxpeft.data import ReadOptions, Tables, encode_label_lists, read_tables, text_splits, with_label_lists
from jaxpeft.data.labels import encode_labels
from jaxpeft.errors import InputError

THREE = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]


def encode(train, validation=(), **options):
    columns = {"train": train, **({"dev": validation} if len(validation) else {})}
    return encode_label_lists(columns, ReadOptions(**options))


def table(train, **options):
    found = encode(train, **options)
    labels = found.columns["train"]
    assert labels.dtype == np.float32
    assert labels.shape[1] == found.num_labels
    return labels.tolist(), found.names


def splits(path, **options):
    file = {name: options.pop(name) for name in ("validation_file", "test_file") if name in options}
    return text_splits(
        *with_label_lists(read_tables(train_file=str(path), **file), ReadOptions(**options)), encode_label_lists
    )


def written(directory, name, lines):
    (directory / name).write_text("\n".join(lines) + "\n")
    return directory / name


FORMS = {
    "lists": [["a", "c"], [], ["b"], ["c", "b", "a", "a"]],
    "commas": ["a,c", "", "b", "c, b , a,"],
    "semicolons": ["a;c", " ", "b", "c;b;a"],
    "bars": ["a|c", "", "b", "c|b|a"],
    "lists of Python as text": ["['a', 'c']", "[]", "['b']", "['c', 'b', 'a']"],
    "lists of JSON as text": ['["a","c"]', "[]", '["b"]', '["c","b","a"]'],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_table(form):
    assert table(FORMS[form]) == (THREE, ("a", "b", "c"))


def test_how_texts_were_read_is_said():
    assert encode(FORMS["semicolons"]).notes == ("the labels are separated by ';'",)
    assert encode(FORMS["lists of JSON as text"]).notes == ("the labels are lists that are written as text",)
    assert encode(["a", "b"]).notes == ("no row of train has more than one class",)
    assert encode([["a"], ["a", "b"]]).notes == ()


def test_a_delimiter_that_is_given():
    assert table(["a, b/c", "", "c", "c/a, b"], label_delimiter="/") == (
        [[1, 1], [0, 0], [0, 1], [1, 1]],
        ("a, b", "c"),
    )
    with pytest.raises(InputError, match=r"data\.label_delimiter '/' is for labels in a text, and these are lists"):
        encode([["a"], ["b"]], label_delimiter="/")


def test_ids_names_and_their_order():
    assert table([[2, 0], [], [1], [0, 1, 2]]) == (THREE, None)
    assert table(["2,0", "", "1", "0,1,2"]) == (THREE, None)
    assert table([[2, 0], [], [1], [0, 1, 2]], label_names=["x", "y", "z"]) == (THREE, ("x", "y", "z"))
    assert table([["c", "a"], [], ["b"], ["a", "b", "c"]], label_names=["c", "b", "a"])[0] == THREE
    assert table([[1], [0]], num_labels=3)[0] == [[0, 1, 0], [1, 0, 0]]
    assert table([["B"], ["a", "B"]], base_names=("A", "B", "C")) == ([[0, 1, 0], [1, 1, 0]], ("A", "B", "C"))
    assert table([[10], [7, 10]]) == ([[0, 1], [1, 1]], ("7", "10"))


def test_a_number_for_each_class():
    vectors = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    for values in (vectors, np.asarray(vectors, float).tolist(), np.asarray(vectors, bool).tolist()):
        assert table(values) == (THREE, None)
    assert encode(vectors).notes == ("every label is a list of 3 numbers 0 or 1, one for each class",)
    assert table(vectors, label_names=["x", "y", "z"])[1] == ("x", "y", "z")
    with pytest.raises(InputError, match=r"a list of 3 numbers 0 or 1, but data\.label_names says 2 classes"):
        encode(vectors, label_names=["x", "y"])
    # Two different ids in every list are ids.
    assert table([[0, 1], [1, 2]])[0] == [[1, 1, 0], [0, 1, 1]]
    assert table([[0, 1], [1, 0]])[0] == [[1, 1], [1, 1]]


@pytest.mark.parametrize("value", [None, -1, float("nan"), "-", "null", "-1"])
def test_no_label_is_not_no_class(value):
    values = [["a"], [], value, ["a", "b"]] if not isinstance(value, str) else ["a", "", value, "a,b"]
    with pytest.raises(InputError, match=r"^train, row 3: the label is missing .* data\.drop_unlabelled true"):
        encode(values)
    found = encode(values, drop_unlabelled=True)
    assert found.columns["train"].tolist() == [[1, 0], [0, 0], [1, 1]]
    assert found.rows["train"].tolist() == [0, 1, 3]
    assert "1 of 4 rows of train have no label and are left out" in found.notes


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["a,b", "a;b"], {}, r"train: the labels contain ',' and ';'; give data\.label_delimiter"),
        ([["a", None], ["b"]], {}, r"train, row 1: None in the labels \['a', None\] is not a class"),
        ([["a"], ["b", -1]], {}, r"train, row 2: -1 in the labels"),
        ([[["a"]], [["b"]]], {}, r"train, row 1: \['a'\] in the labels"),
        (["['a'", "['b']"], {"label_delimiter": None, "label_names": ["a", "b"]}, r"the label '\['a'' is unknown"),
        (["['a', b]", "['b']"], {}, r"train, row 1: the label \"\['a', b\]\" is not a list"),
        ([["a"], ["c"]], {"label_names": ["a", "b"]}, r"train, row 2: the label 'c' is unknown"),
        ([[0], [1], [3]], {"num_labels": 2}, "train, row 3: the label 3 is not one of the ids 0 to 1"),
        ([[], []], {}, r"no row of train has a class; give another data\.label_column"),
        ([["a"], ["a"]], {}, r"all labels of train are 'a'.*data\.label_names"),
        ([None, None], {"drop_unlabelled": True}, "train: none of its 2 rows has a label"),
        ([[1.5], [2]], {"num_labels": 1}, "these labels are numbers, and multi-label needs classes"),
    ],
)
def test_refusals_name_the_row_and_the_value(values, options, message):
    with pytest.raises(InputError, match=message) as error:
        encode(values, **options)
    assert "\n" not in str(error.value)


def test_classes_of_validation_must_be_known():
    with pytest.raises(InputError, match="dev, row 2: the label 'c' is unknown; known: a, b"):
        encode([["a"], ["a", "b"]], [["a"], ["c"]])


COLUMNS = ["text,toxic,obscene,other", "one,1,0,x", "two,0,0,x", "three,true,TRUE,x", "four,0,1,x", "five,False,1.0,x"]


def test_a_column_for_each_class(tmp_path):
    path = written(tmp_path, "a.csv", COLUMNS)
    found = splits(path, label_columns=["toxic", "obscene"])
    assert found.label_names == ("toxic", "obscene")
    rows = {
        text: labels.tolist()
        for split in (found.train, found.validation)
        for text, labels in zip(split.texts, split.labels, strict=True)
    }
    assert rows == {"one": [1, 0], "two": [0, 0], "three": [1, 1], "four": [0, 1], "five": [0, 1]}
    assert splits(path, label_columns=["obscene", "toxic"]).label_names == ("obscene", "toxic")


def test_columns_of_a_table_with_types(tmp_path):
    lines = [{"text": f"text {i}", "a": i % 2 == 0, "b": float(i % 3 == 0), "c": i % 5 == 0} for i in range(20)]
    found = splits(written(tmp_path, "a.jsonl", map(json.dumps, lines)), label_columns=["c", "a", "b"])
    assert found.train.labels.shape == (18, 3)
    assert found.validation.labels.shape == (2, 3)
    assert "no validation split: a fixed random 2 of 20 rows" in found.notes[0]


def test_a_withheld_test_split_of_columns_is_left_out(tmp_path):
    """As in the toxic comments of Kaggle, whose rows without labels have -1 in every column."""
    path = written(tmp_path, "a.csv", COLUMNS)
    test = written(tmp_path, "test.csv", ["text,toxic,obscene", "one,-1,-1", "two,-1,-1"])
    found = splits(path, label_columns=["toxic", "obscene"], test_file=str(test))
    assert found.test is None
    assert any("are all -1 or empty" in note for note in found.notes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("six,2,0,x", r"a\.csv, row 6: column 'toxic' has '2', which is not 0, 1, true or false"),
        ("six,,0,x", r"row 6: the label is missing"),
    ],
)
def test_values_that_are_neither_0_nor_1(line, message, tmp_path):
    with pytest.raises(InputError, match=message):
        splits(written(tmp_path, "a.csv", [*COLUMNS, line]), label_columns=["toxic", "obscene"])


def test_a_column_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match=r"data\.label_columns: .*a\.csv has no column 'toxi'; did you mean 'toxic'"):
        splits(written(tmp_path, "a.csv", COLUMNS), label_columns=["toxi", "obscene"])


def test_the_hub_s_lists_of_class_labels():
    names = ["anger", "joy", "love"]
    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=names))})
    rows = {"text": [f"text {i}" for i in range(20)], "labels": [[0, 2], [], [1], [2]] * 5}
    train = Dataset.from_dict(rows, features=features)
    read = Tables(
        {"train": train, "validation": train}, {"train": "x [train]", "validation": "x [validation]"}, "hub", "x"
    )
    found = text_splits(*with_label_lists(read, ReadOptions()), encode_label_lists)
    assert found.label_names == tuple(names)
    assert found.train.labels[:4].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_parquet_with_lists(tmp_path):
    rows = {"text": [f"text {i}" for i in range(20)], "label": [["b", "a"], [], ["b"], ["a"]] * 5}
    Dataset.from_dict(rows).to_parquet(tmp_path / "a.parquet")
    found = splits(tmp_path / "a.parquet")
    assert found.label_names == ("a", "b")
    assert found.train.labels.sum() + found.validation.labels.sum() == 20


def test_a_classification_says_that_there_is_a_task_for_lists():
    notes = encode_labels({"train": ["a,b", "b", "a, c", "b;c"]}).notes
    assert "--task multi-label reads lists" in notes[0]
    with pytest.raises(
        InputError, match=r"the label \[1\] is neither .* or --task multi-label, which reads lists of classes"
    ):
        encode_labels({"train": [[1], [2]]})
