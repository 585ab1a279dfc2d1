"""Whole runs on a base that knows its classes by name: whose ids they get, and who is told their names."""

import contextlib
import functools
import json
import shutil

import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file, save_file

from jaxpeft import load_run
from jaxpeft.config import DataConfig, ModelConfig
from jaxpeft.runs.data import load_data

pytestmark = pytest.mark.xdist_group("runs")

FLAGS = """
--task classification --model.name judge --data.bucket_lengths [16] --training.num_steps 2 --training.batch_size 8
"""


@pytest.fixture(name="root")
def _root(tmp_path_factory):
    return workplace(tiny_runs.workplace(tmp_path_factory))


@functools.cache
def workplace(root):
    """With `judge`: `base` as a classifier whose id 0 is POSITIVE, and that always says so. And with files of labels."""
    shutil.copytree(root / "base", root / "judge")
    config = json.loads((root / "judge" / "config.json").read_text())
    config |= {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    (root / "judge" / "config.json").write_text(json.dumps(config))
    tensors = load_file(root / "judge" / "model.safetensors")
    head = {"classifier.weight": np.zeros((2, 16), np.float32), "classifier.bias": np.array([3, 0], np.float32)}
    tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}  # as torch names them beside a classifier
    save_file({**tensors, **head}, root / "judge" / "model.safetensors")
    texts = tiny_runs.SENTENCES[:40]
    films = [f"{text}\t{'negative' if i % 10 == 4 else 'positive'}" for i, text in enumerate(texts)]
    (root / "films.tsv").write_text("text\tlabel\n" + "\n".join(films))
    topics = [f"{text}\t{['007', '010', '+3', '-', ''][i % 5]}" for i, text in enumerate(texts)]
    (root / "topics.tsv").write_text("text\tlabel\n" + "\n".join(topics))
    return root


@functools.cache
def films(root):
    """36 of 40 rows are positive."""
    return tiny_runs.train(root, f"--name films --data.train_file films.tsv --data.validation_file films.tsv {FLAGS}")


@functools.cache
def topics(root):
    """Codes as labels, of three classes; two fifths of the rows have none."""
    return tiny_runs.train(
        root,
        f"--name topics --data.train_file {root}/topics.tsv --data.drop_unlabelled true {FLAGS} --evaluation.before false",
    )


def test_classes_of_the_base_keep_its_ids_and_its_head(root):
    directory, results = films(root)
    assert results["before"]["accuracy"] == pytest.approx(0.9)
    assert results["label_names"] == ["POSITIVE", "NEGATIVE"]
    assert "the classes are the base's own: 0 POSITIVE, 1 NEGATIVE" in results["data_notes"]
    own = {"id2label": {"0": "POSITIVE", "1": "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
    assert json.loads((directory / "adapter" / "labels.json").read_text()) == own
    tiny_runs.jaxpeft(root, "merge", "runs/films", "merged-films")
    config = json.loads((root / "merged-films" / "config.json").read_text())
    assert {key: config[key] for key in own} == own


def test_ids_on_such_a_base_are_answered_by_name(root):
    rows = "".join(f"a line\t{i % 2}\n" for i in range(20))
    (root / "numbers.tsv").write_text("text\tlabel\n" + rows)
    with contextlib.chdir(root):
        _, splits = load_data(DataConfig(train_file="numbers.tsv"), "classification", ModelConfig(name="judge"))
        (answer,) = load_run("runs/films" if films(root) else "").predict(["A call."])
    assert splits.label_names == ("POSITIVE", "NEGATIVE")
    assert sorted(name for name, _ in answer) == ["NEGATIVE", "POSITIVE"]


def test_the_metric_that_chose_is_recorded(root):
    """Without `training.metric`, a classification keeps the adapter of the best accuracy, and says so."""
    directory, results = films(root)
    assert results["best_metric"] == "accuracy"
    assert "the best on validation by accuracy" in (directory / "adapter" / "README.md").read_text()
    validations = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    best = max(row["accuracy"] for row in validations if row["split"] == "validation" and row["step"])
    (kept,) = [row for row in validations if row["split"] == "validation" and row["step"] == results["best_step"]]
    assert kept["accuracy"] == best


def test_two_classes_are_measured_one_by_one(root, capsys):
    directory, results = films(root)
    assert set(results["test"]) == {"loss", "accuracy", "f1", "matthews"}
    positive, negative = results["classes"]
    assert (positive["name"], positive["rows"], negative["name"], negative["rows"]) == ("POSITIVE", 36, "NEGATIVE", 4)
    confusion = np.array(results["confusion"])
    assert confusion.sum(1).tolist() == [36, 4]
    assert confusion.trace() / 40 == pytest.approx(results["test"]["accuracy"])
    assert negative["f1"] == pytest.approx(results["test"]["f1"])
    card = (directory / "adapter" / "README.md").read_text()
    assert "| F1 of 'NEGATIVE' |" in card
    assert "| POSITIVE | 36 |" in card
    assert "](confusion.png)" in card
    assert (directory / "confusion.png").read_bytes() == (directory / "adapter" / "confusion.png").read_bytes()
    tiny_runs.jaxpeft(root, "evaluate", "runs/films")
    shown = capsys.readouterr().out
    assert f"Matthews correlation     {results['test']['matthews']:.4f}" in shown
    assert "POSITIVE" in shown


def test_a_base_of_another_number_of_classes_gets_a_new_head(root, capsys):
    topics.cache_clear()
    shutil.rmtree(root / "runs" / "topics", ignore_errors=True)
    directory, results = topics(root)
    shown = capsys.readouterr().out
    assert (
        "the checkpoint's head has 2 outputs and this data needs 3, so initialised at random and trained: classifier"
        in shown
    )
    assert f"16 of 40 rows of train ({root}/topics.tsv) have no label and are left out" in shown
    assert "(10 %, stratified by class)" in shown
    assert results["label_names"] == ["+3", "007", "010"]
    assert results["parameters_total"] - results["parameters_trainable"] > 0
    card = (directory / "adapter" / "README.md").read_text()
    assert "labels = {0: '+3', 1: '007', 2: '010'}" in card
    assert "ignore_mismatched_sizes=True" in card
    assert str(root) not in card
    with contextlib.chdir(root):
        (answer,) = load_run("runs/topics").predict(["A call."])
    assert sorted(name for name, _ in answer) == ["+3", "007", "010"]


def test_peft_loads_it_by_the_lines_of_the_card(root, monkeypatch):
    pytest.importorskip("peft", reason="needs peft: pip install -e '.[test]'")
    import torch

    directory, _ = topics(root)
    monkeypatch.chdir(root)
    card = (directory / "adapter" / "README.md").read_text()
    lines = card.split("```python\n")[2].split("```")[0]
    scope = {}
    exec(lines.replace("'path/to/judge'", "'judge'").replace("path/to/", "runs/"), scope)
    names = scope["model"].config.id2label
    with torch.no_grad():
        theirs = scope["model"](**scope["tokenizer"](["A call."], return_tensors="pt")).logits.softmax(-1)[0]
    (ours,) = load_run("runs/topics").predict(["A call."])
    assert dict(ours) == pytest.approx({names[i]: float(p) for i, p in enumerate(theirs)}, abs=1e-5)
