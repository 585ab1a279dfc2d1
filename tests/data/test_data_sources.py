import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest

from jaxpeft.data import GLUE, load_file, load_splits, tables
from jaxpeft.data.hub import hub_id
from jaxpeft.errors import InputError

ROWS = [{"text": f"text {row}", "label": row % 2} for row in range(20)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: `hub["name"]` is what `read_hub` gives."""
    shelf = {}
    monkeypatch.setattr(tables, "read_hub", lambda name, *, subset=None: shelf[name])
    return shelf


def test_wikitext_files(real_data):
    split = load_file(str(real_data / "wikitext-2" / "valid.txt"))
    assert len(split) == 3760
    assert split.labels is None
    assert split.pairs is None
    assert any("<unk>" in text for text in split.texts)


def test_sst2_files(real_data):
    folder = real_data / "sst2"
    splits = load_splits(train_file=str(folder / "train.tsv"), validation_file=str(folder / "dev.tsv"))
    assert (len(splits.train), len(splits.validation), splits.test) == (67_349, 872, None)
    assert splits.train.labels.dtype == np.int32
    assert (splits.num_labels, splits.notes) == (2, ())
    assert np.bincount(splits.validation.labels).tolist() == [428, 444]


def test_sst2_sentences_without_header(real_data):
    path = str(real_data / "sst2" / "train-sentences.tsv")
    split = load_file(path, column_names=("sentence", "label"))
    assert len(split) == 6920
    assert set(split.labels.tolist()) == {0, 1}
    with pytest.raises(InputError, match=r"no column is known to be the text.*column_names"):
        load_file(path)


def write_as(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif suffix == ".jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".json":
        write(path, json.dumps(ROWS))
    else:
        mark = "," if suffix == ".csv" else "\t"
        write(path, f"text{mark}label\n" + "".join(f"{row['text']}{mark}{row['label']}\n" for row in ROWS))
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(suffix, tmp_path):
    split = load_file(write_as(suffix, tmp_path))
    assert split.texts == [row["text"] for row in ROWS]
    assert split.labels.tolist() == [row["label"] for row in ROWS]


def test_text_stays_text(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\nNA,0\n"a, b",1\n12,0\nnull,1\n')
    assert load_file(path).texts == ["NA", "a, b", "12", "null"]
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\na " stray\t1\n"whole"\t0\n')
    assert load_file(path).texts == ['a " stray', '"whole"']
    path = write(tmp_path / "a.txt", "one\n\n two\n")
    assert load_file(path).texts == ["one", "", " two"]


def test_files_override_the_name_and_hold_out_a_tenth(tmp_path):
    path = write_as(".csv", tmp_path)
    first, second = (load_splits("glue/sst2", train_file=path) for _ in range(2))
    assert (len(first.train), len(first.validation)) == (18, 2)
    assert first.validation.texts == second.validation.texts
    assert set(first.train.texts) | set(first.validation.texts) == {row["text"] for row in ROWS}
    assert "'glue/sst2' is not read" in first.notes[0]
    assert "fixed random 2 of 20 rows" in first.notes[1]


def test_running_text_holds_out_its_end(tmp_path):
    splits = load_splits(train_file=write(tmp_path / "a.txt", "a\nb\nc\n"))
    assert (splits.train.texts, splits.validation.texts) == (["a", "b"], ["c"])
    with pytest.raises(InputError, match="has 1 row, too few"):
        load_splits(train_file=write(tmp_path / "b.txt", "a\n"))


def test_pairs_and_regression(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence1\tsentence2\tlabel\na\tb\t4.8\nc\td\t1\n")
    split = load_file(path)
    assert (split.texts, split.pairs) == (["a", "c"], ["b", "d"])
    np.testing.assert_allclose(split.labels, [4.8, 1.0])
    path = write(tmp_path / "b.csv", "question,sentence,label\nq,s,1\n")
    assert load_file(path).pairs == ["s"]
    assert load_file(path, text_column="sentence").pairs is None


def test_labels_may_be_left_unread(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,\nb,\n")
    assert load_splits(train_file=path, use_labels=False).train.labels is None
    with pytest.raises(InputError, match=r"train \(.*a\.csv\): none of its 2 rows has a label"):
        load_splits(train_file=path)


def sentences_of_sst2(real_data, number):
    """`number` of SST-2's sentences with their labels, chosen by rule: every ninth."""
    lines = (real_data / "sst2" / "train-sentences.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t") for line in lines[: 9 * number : 9]]


@pytest.mark.parametrize("code", [lambda label: f"0{label}7", lambda label: int(label) + 4, lambda label: f"{label}e3"])
def test_sentences_with_codes_as_labels_and_a_tenth_of_them_missing(code, real_data, tmp_path):
    """Every tenth label is missing, in each of the usual ways in turn: refused in one line, or left out and counted."""
    rows = sentences_of_sst2(real_data, 200)
    hidden = ["", "-", "null", None, -1]
    labels = [hidden[row // 10 % 5] if row % 10 == 3 else code(label) for row, (_, label) in enumerate(rows)]
    path = tmp_path / "codes.jsonl"
    texts = [text for text, _ in rows]
    write(
        path,
        "".join(
            json.dumps({"text": t, "label": str(y) if y is not None else None}) + "\n"
            for t, y in zip(texts, labels, strict=True)
        ),
    )
    with pytest.raises(
        InputError, match=r"row 4: the label is missing \(''\), as in 20 of 200 rows; .*data\.drop_unlabelled true"
    ):
        load_splits(train_file=str(path))
    splits = load_splits(train_file=str(path), drop_unlabelled=True)
    assert splits.label_names == tuple(str(code(label)) for label in "01")
    assert splits.notes[0] == f"20 of 200 rows of train ({path}) have no label and are left out"
    expected = {text: int(label) for row, (text, label) in enumerate(rows) if row % 10 != 3}
    for split in (splits.train, splits.validation):
        assert split.labels.tolist() == [expected.pop(text) for text in split.texts]
    assert not expected


def test_held_out_rows_are_stratified(tmp_path):
    labels = ["rare"] * 10 + ["usual"] * 89 + ["single"]
    path = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"text {i}\t{y}\n" for i, y in enumerate(labels)))
    splits = load_splits(train_file=path)
    assert splits.label_names == ("rare", "single", "usual")
    assert np.bincount(splits.validation.labels, minlength=3).tolist() == [1, 0, 9]
    assert np.bincount(splits.train.labels).tolist() == [9, 1, 80]
    assert splits.notes == (
        f"no validation split: a fixed random 10 of 100 rows of {path} are held out (10 %, stratified by class)",
    )


def test_one_class_alone_is_refused_unless_the_others_are_named(tmp_path):
    for label in ("good", "0", "3"):
        path = write(tmp_path / "a.tsv", "text\tlabel\n" + f"a line\t{label}\n" * 20)
        with pytest.raises(InputError, match=rf"all labels of train \(.*\) are '{label}'.*data\.label_names"):
            load_splits(train_file=path)
    splits = load_splits(train_file=path, label_names=["3", "4"])
    assert splits.notes[0] == f"no row of train ({path}) has the class '4'"


def test_a_test_file_may_have_no_labels(tmp_path):
    train = write_as(".csv", tmp_path)
    bare = write(tmp_path / "bare.csv", "text\na\nb\n")
    splits = load_splits(train_file=train, test_file=bare)
    assert splits.test is None
    assert splits.notes[0] == f"{bare} has no label column: it is not used"
    empty = write(tmp_path / "empty.csv", "text,label\na,\nb,\n")
    splits = load_splits(train_file=train, test_file=empty)
    assert splits.test is None
    assert splits.notes[0] == f"the labels of {empty} are all -1 or empty (not public): it is not used"
    with pytest.raises(InputError, match=r"bare.csv has no label column, but train has one; columns: text"):
        load_splits(train_file=train, validation_file=bare)


CASES = [
    ("a.xlsx", "x", {}, r"a.xlsx: the suffix '.xlsx' is not one of .txt, .csv"),
    ("a.csv", "", {}, r"a.csv is empty \(0 bytes\)"),
    ("a.csv", "text,label\n", {}, r"a.csv has no rows"),
    ("a.csv", "text,label\n \n", {}, r"a.csv, line 2: 2 columns \(text, label\) but 1 field; .*line breaks"),
    ("a.csv", "text,label\nGood, really,1\n", {}, r"a.csv, line 2: 2 columns \(text, label\) but 3 fields; .*quote"),
    ("a.csv", "text,label\na,1\nb,2,3\n", {}, r"a.csv, line 3: 2 columns .* but 3 fields"),
    ("a.csv", "text,text\na,1\n", {}, r"a column name occurs twice"),
    ("a.csv", "review,stars\na,1\n", {}, r"no column is known to be the text \(review, stars\); set data\.text_column"),
    ("a.csv", "text,sentence\na,b\n", {}, r"several columns could be the text \(text, sentence\)"),
    (
        "a.csv",
        "text,label\na,1\n",
        {"text_column": "txt"},
        r"text_column='txt': .*did you mean 'text'\?; columns: text",
    ),
    ("a.csv", "text,label\na,1\n", {"label_column": "y"}, r"label_column='y': .*columns: text, label"),
    ("a.csv", "text,label\na,1\n", {"text_pair_column": "label"}, r"also needs data\.text_column;"),
    ("a.txt", "a\n", {"column_names": ("text",)}, r"column_names is for .csv, .tsv and CoNLL files"),
    ("a.txt", "\n\n", {}, r"column 'text' has no text in its 2 rows"),
    ("a.jsonl", '{"text": "a"}\n{"text\n', {}, r"a.jsonl, line 2: not JSON: "),
    ("a.jsonl", '{"text": "a"}\n{"text": null}\n', {}, r"a.jsonl, row 2: column 'text' has no text .*data.drop_empty"),
    ("a.jsonl", '{"text": 5}\n', {}, r"a.jsonl, row 1: column 'text' holds 5, not text"),
    ("a.parquet", "x", {}, r"a.parquet cannot be read as .parquet"),
]


@pytest.mark.parametrize(("name", "content", "options", "message"), CASES)
def test_files_that_are_refused(name, content, options, message, tmp_path, capfd):
    with pytest.raises(InputError, match=message) as error:
        load_file(write(tmp_path / name, content), **options)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_missing_files_and_names(tmp_path):
    write(tmp_path / "train.csv", "text\na\n")
    with pytest.raises(InputError, match=r"no file .*trian.csv; did you mean '.*train.csv'"):
        load_file(str(tmp_path / "trian.csv"))
    with pytest.raises(InputError, match=r"no file /nowhere/a.csv; check the path"):
        load_file("/nowhere/a.csv")
    with pytest.raises(InputError, match=r"a.csv is given without data.train_file"):
        load_splits("glue/sst2", validation_file="a.csv")
    with pytest.raises(InputError, match=r"no dataset: set data.name"):
        load_splits()


def test_short_names():
    assert hub_id("wikitext-2-raw-v1", None) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert hub_id("glue/mrpc", None) == ("nyu-mll/glue", "mrpc")
    assert hub_id("stanfordnlp/imdb", "plain_text") == ("stanfordnlp/imdb", "plain_text")
    with pytest.raises(InputError, match=r"'glue/sst-2' is unknown; did you mean 'glue/sst2'\?"):
        hub_id("glue/sst-2", None)
    for name in ("", "a/b/c", "python-doc", "my data"):
        with pytest.raises(InputError, match=rf"dataset '{name}' is unknown.*; known: python-docs"):
            hub_id(name, None)
    with pytest.raises(InputError, match=r"subset 'x' cannot be set for"):
        hub_id("glue/sst2", "x")
    assert GLUE["stsb"].num_labels == 1
    assert len(GLUE) == 9


def hub_table(texts, labels, names=("no", "yes"), columns=("sentence",)):
    data = {**dict.fromkeys(columns, texts), "label": labels, "idx": list(range(len(texts)))}
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("float32")
    text = datasets.Value("string")
    features = datasets.Features({**dict.fromkeys(columns, text), "label": label, "idx": datasets.Value("int32")})
    return datasets.Dataset.from_dict(data, features=features)


def test_glue_from_the_hub(hub):
    hub["glue/cola"] = {
        "train": hub_table(["a", "b"], [0, 1]),
        "validation": hub_table(["c"], [1]),
        "test": hub_table(["d"], [-1]),
    }
    splits = load_splits("glue/cola")
    assert splits.label_names == ("no", "yes")
    assert splits.num_labels == 2
    assert splits.test is None
    assert splits.notes == ("the labels of glue/cola [test] are all -1 or empty (not public): it is not used",)
    assert splits.source == "hub dataset glue/cola: train, validation, test"


def test_the_ids_of_a_hub_dataset_are_places_in_its_names_even_if_these_are_numbers(hub):
    hub["me/stars"] = {"train": hub_table(["a", "b", "c", "d"], [2, 1, -1, 2], ("0", "2", "1"), ("text",))}
    with pytest.raises(InputError, match=r"row 3: the label is missing \(-1\)"):
        load_splits("me/stars")
    splits = load_splits("me/stars", drop_unlabelled=True)
    assert splits.label_names == ("0", "2", "1")
    assert sorted([*splits.train.labels, *splits.validation.labels]) == [1, 2, 2]
    assert load_splits("me/stars", label_names=["a", "b", "c"], drop_unlabelled=True).label_names == ("a", "b", "c")


def test_mnli_validates_on_matched(hub):
    names, columns = ("e", "n", "c"), ("premise", "hypothesis")
    hub["glue/mnli"] = {
        split: hub_table([split], [2], names, columns)
        for split in ("train", "validation_matched", "validation_mismatched")
    }
    assert load_splits("glue/mnli").validation.pairs == ["validation_matched"]
    chosen = load_splits("glue/mnli", validation_split="validation_mismatched")
    assert chosen.validation.texts == ["validation_mismatched"]
    assert chosen.num_labels == 3


def test_stsb_is_regression_and_other_hub_datasets_hold_out(hub):
    hub["glue/stsb"] = {"train": hub_table(["a"] * 10, [5.0] * 10, None, ("sentence1", "sentence2"))}
    splits = load_splits("glue/stsb")
    assert (splits.num_labels, splits.train.labels.dtype) == (1, np.float32)
    assert (len(splits.train), len(splits.validation)) == (9, 1)
    hub["me/reviews"] = {"test": hub_table(["a"], [0], columns=("text",))}
    with pytest.raises(InputError, match=r"'me/reviews' has no split 'train'; splits: test"):
        load_splits("me/reviews")
    with pytest.raises(InputError, match=r"test_split: the dataset 'glue/stsb' has no split 'x'; splits: train"):
        load_splits("glue/stsb", test_split="x")


OFFLINE = """
import time
time.sleep = lambda seconds: None  # the hub's client waits 23 s between its tries
from jaxpeft.data import load_splits
from jaxpeft.errors import InputError
for name in ("glue/sst2", "me/nothing"):
    try:
        load_splits(name)
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("variables", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_an_unreachable_hub_is_one_line(variables, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1", **variables}
    run = subprocess.run([sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first.startswith("dataset 'glue/sst2' (hub: nyu-mll/glue, sst2) cannot be loaded: Couldn't reach")
    assert second.startswith("dataset 'me/nothing' (hub: me/nothing) cannot be loaded: Couldn't reach")
    assert first.endswith("give local files: data.train_file and data.validation_file")
    assert run.stderr == ""


def test_importing_is_cheap():
    code = "import sys, jaxpeft.data; print({'datasets', 'transformers', 'jax', 'pandas'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_first_line_that_repeats_the_column_names_is_a_header(tmp_path):
    plain, headed = tmp_path / "train.tsv", tmp_path / "dev.tsv"
    plain.write_text("good\t1\nbad\t0\n")
    headed.write_text("sentence\tlabel\nfine\t1\n")
    splits = load_splits(
        train_file=str(plain), validation_file=str(headed), column_names=("sentence", "label"), label_column="label"
    )
    assert splits.train.texts == ["good", "bad"]
    assert splits.validation.texts == ["fine"]
