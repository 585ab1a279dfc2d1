"""Multi-label classification: torch's loss, scikit-learn's metrics, the threshold, answers, and whole runs."""

import csv
import json
import os
import signal
from dataclasses import replace

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_runs

from jaxpeft import load_run
from jaxpeft.adapters import Lora
from jaxpeft.config import DataConfig, RunConfig, TrainingConfig
from jaxpeft.data import ReadOptions, Split, Splits
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar
from jaxpeft.tasks import task_for
from jaxpeft.tasks.multi_label import ClassesOfText, MultiLabel, best_threshold, probabilities
from jaxpeft.tasks.text_pipeline import RowOptions
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.step import make_train_step

pytestmark = pytest.mark.xdist_group("runs")

NAMES = ("toxic", "obscene", "insult")
CHANCES = np.array([[0.9, 0.6, 0.1], [0.2, 0.7, 0.4], [0.3, 0.2, 0.1]])
LOGITS = np.log(CHANCES) - np.log1p(-CHANCES)
LABELS = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0]], np.float32)


def measured(task, logits=LOGITS, labels=LABELS):
    return task.measure({"loss": 1.0, "weight": 1.0}, logits, labels)


def test_the_loss_is_that_of_transformers():
    """`problem_type="multi_label_classification"`: the mean over all entries."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    logits, labels = tiny.normal(0, 4, 3), (tiny.normal(1, 4, 3) > 0).astype(np.float32)
    total, weight = MultiLabel(3).loss(jnp.asarray(logits), {"labels": labels, "weights": np.ones(4, np.float32)})
    expected = torch.nn.BCEWithLogitsLoss()(torch.tensor(logits), torch.tensor(labels))
    assert float(total / weight) == pytest.approx(expected.item(), rel=1e-6)
    config = BertConfig(**{**tiny.CONFIGS["bert"], "num_labels": 3, "problem_type": MultiLabel.problem_type})
    model = BertForSequenceClassification(config).eval()
    batch = {
        key: torch.tensor(tiny.batch(4, task="classification")[key], dtype=torch.long)
        for key in ("input_ids", "attention_mask")
    }
    out = model(**batch, labels=torch.tensor(labels))
    theirs, _ = MultiLabel(3).loss(
        jnp.asarray(out.logits.detach().numpy()), {"labels": labels, "weights": np.ones(4, np.float32)}
    )
    assert float(theirs) / 4 == pytest.approx(out.loss.item(), rel=1e-5)


def test_metrics_by_hand():
    """Predicted: toxic and obscene; obscene; nothing. Of 3 true classes 2 are found, and one is wrong."""
    metrics = measured(MultiLabel(3))
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics["exact_match"] == pytest.approx(1 / 3)  # the text without a class
    lower = measured(MultiLabel(3, threshold=0.35))  # finds the insult
    assert lower["micro_f1"] == pytest.approx(2 * 3 / (4 + 3))
    assert lower["exact_match"] == pytest.approx(2 / 3)


def test_figures_of_each_class():
    toxic, obscene, insult = MultiLabel(3).by_class(LOGITS, LABELS, NAMES).classes
    assert (toxic.name, toxic.rows, toxic.predicted, toxic.precision, toxic.recall) == ("toxic", 1, 1, 1.0, 1.0)
    assert (obscene.rows, obscene.predicted, obscene.precision, obscene.recall) == (1, 2, 0.5, 1.0)
    assert (insult.rows, insult.predicted, insult.f1) == (1, 0, 0.0)
    assert MultiLabel(3).by_class(LOGITS, LABELS, NAMES).confusion is None


def test_the_threshold_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.random((30, 4)), rng.random((30, 4)) < 0.3
        scores[labels] = np.minimum(scores[labels] + 0.2, 0.999)
        found = best_threshold(scores, labels)
        values = {t: _micro_f1(scores > t, labels) for t in [found, *(np.unique(scores) - 1e-9)]}
        assert values[found] == max(values.values())


def _micro_f1(predicted, labels):
    return 2 * (predicted & labels).sum() / max(predicted.sum() + labels.sum(), 1)


def test_thresholds_by_hand():
    assert best_threshold(
        np.array([[0.9, 0.4], [0.3, 0.1]]), np.array([[True, True], [False, False]])
    ) == pytest.approx(0.35)
    assert best_threshold(np.array([[0.9, 0.4]]), np.array([[False, False]])) == 0.5
    # All are right: every threshold below 0.6 is as good, and none of them is between two scores but the lowest.
    assert best_threshold(np.array([[0.8, 0.6]]), np.array([[True, True]])) == pytest.approx(0.3)
    # Equal scores cannot be told apart.
    assert best_threshold(
        np.array([[0.7, 0.7], [0.2, 0.2]]), np.array([[True, False], [False, False]])
    ) == pytest.approx(0.45)


def test_calibration_is_kept_and_given_back():
    task = MultiLabel(3).calibrated(LOGITS, LABELS)
    assert task.calibration == {"threshold": pytest.approx(0.35)}
    assert MultiLabel(3, **task.calibration) == task
    assert measured(task)["micro_f1"] > measured(MultiLabel(3))["micro_f1"]


def test_answers():
    task = MultiLabel(3)
    first, second, third = task.answers(LOGITS, NAMES, None)
    assert first.labels == ("toxic", "obscene")
    assert dict(second.probabilities) == pytest.approx({"obscene": 0.7, "insult": 0.4, "toxic": 0.2})
    assert task.in_words(first) == ["toxic 90.0 %, obscene 60.0 % (not: insult 10.0 %)"]
    assert task.in_words(third) == ["no class (not: toxic 30.0 %, obscene 20.0 %, insult 10.0 %)"]
    assert task.as_record(third)["labels"] == []
    # At least the predicted ones, whatever `top` says.
    assert [len(answer.probabilities) for answer in task.answers(LOGITS, NAMES, 1)] == [2, 1, 1]
    assert task.answers(LOGITS, None, 1)[1] == ClassesOfText(("1",), [("1", pytest.approx(0.7))])


def test_probabilities_do_not_overflow():
    np.testing.assert_allclose(probabilities(np.array([-1e4, 0.0, 1e4], np.float32)), [0, 0.5, 1], atol=1e-12)


def test_data_without_labels_is_refused_with_both_flags():
    split = Split(["a", "b"])
    with pytest.raises(
        InputError, match=r"multi-label needs labels, and x has none; .*data\.label_column, .*data\.label_columns"
    ):
        task_for("multi-label", 2).check_data(Splits(split, split, None, None, None, "x"))


@pytest.mark.parametrize(
    ("task", "data", "message"),
    [
        ("multi-label", {"regression": True}, "data.regression is for classification, and multi-label cannot use it"),
        ("classification", {"label_columns": ["a", "b"]}, "data.label_columns is for multi-label, and classification"),
        ("classification", {"label_delimiter": ","}, "data.label_delimiter is for multi-label, and classification"),
        (
            "masked-lm",
            {"label_delimiter": ","},
            "data.label_delimiter is for tasks with labels, and masked-lm reads none",
        ),
        ("multi-label", {"label_columns": ["a"]}, "data.label_columns is .* two or more columns"),
        ("multi-label", {"label_columns": ["a", "a"]}, "data.label_columns is .* each given once"),
        ("multi-label", {"label_columns": ["a", "b"], "label_names": ["a", "b"]}, "label_names has no meaning beside"),
        ("multi-label", {"label_columns": ["a", "b"], "label_column": "a"}, "label_column has no meaning beside them"),
        ("multi-label", {"label_delimiter": ""}, "data.label_delimiter is ; it must be at least one character"),
    ],
)
def test_flags_that_do_not_fit(task, data, message):
    with pytest.raises(InputError, match=message):
        RunConfig(task=task, data=DataConfig(train_file="a.csv", **data))


def test_weights_and_smoothing_are_for_one_class_a_text():
    for options in ({"label_smoothing": 0.1}, {"class_weights": "balanced"}):
        with pytest.raises(InputError, match="is for classification, and the task is multi-label; leave it out"):
            RunConfig(task="multi-label", data=DataConfig(train_file="a.csv"), training=TrainingConfig(**options))


def test_options_of_reading_know_the_new_flags():
    assert ReadOptions().label_columns is ReadOptions().label_delimiter is None


def test_shapes_and_passes(tiny_models):
    """The shapes that `preflight` compiles for are those of a batch; and a step in passes of three rows is that of the whole batch."""
    labels = (np.random.default_rng(0).random((8, 3)) < 0.4).astype(np.float32)
    batch, task = {**tiny.batch(8, task="classification"), "labels": labels}, MultiLabel(3)
    shapes = task.batch_shapes(RowOptions(), 8, tiny.SEQUENCE)
    assert {name: (shape.shape, shape.dtype) for name, shape in shapes.items()} == {
        name: (value.shape, value.dtype) for name, value in batch.items()
    }
    model, found = tiny_models("bert", "classification", num_labels=3), []
    for micro_batches in (WHOLE, MicroBatches(rows=3)):
        objective, optimizer, frozen, state = tiny.training(model, Lora(rank=2))
        step = make_train_step(replace(objective, task=task), optimizer, micro_batches=micro_batches)
        state, metrics = step(state, frozen, batch)
        found.append(tiny.snapshot((state.adapters, metrics)))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


# Whole runs.

FLAGS = """
--task multi-label --model.name base --data.train_file topics.csv --data.validation_file topics.csv --data.test_file topics.csv
--data.label_column topics --data.bucket_lengths [16] --training.num_steps 4 --training.batch_size 8
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The workplace with a file in which a text has up to three classes."""
    root = tiny_runs.workplace(tmp_path_factory)
    with (root / "topics.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "topics"])
        for i, line in enumerate(tiny_runs.SENTENCES[:40]):
            classes = [name for name, has in (("code", "(" in line), ("long", len(line) > 60), ("odd", i % 2)) if has]
            writer.writerow([line, "; ".join(classes)])
    return root


def test_a_run_from_the_file_to_its_answers(root, capsys):
    directory, results = tiny_runs.train(root, f"--name topics-all {FLAGS}")
    shown = capsys.readouterr().out
    threshold = results["calibration"]["threshold"]
    assert "the labels are separated by ';'" in shown
    assert f"threshold {threshold:.4g}, chosen on the validation rows" in shown
    assert results["label_names"] == ["code", "long", "odd"]
    assert set(results["test"]) == {"loss", "micro_f1", "macro_f1", "exact_match"}
    assert [figures["name"] for figures in results["classes"]] == ["code", "long", "odd"]
    assert results["confusion"] is None
    card = (directory / "adapter" / "README.md").read_text()
    assert f"Chosen on the validation rows: threshold {threshold:.4g}" in card
    assert "model(**inputs).logits.sigmoid()" in card
    assert 'problem_type="multi_label_classification"' in card

    output = root / "topics.jsonl"
    tiny_runs.jaxpeft(root, "predict", "runs/topics-all", "--file", "topics.csv", "--output", str(output))
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    with (root / "topics.csv").open(newline="") as lines:
        truth = [set(filter(None, row["topics"].split("; "))) for row in csv.DictReader(lines)]
    predicted = [set(answer["labels"]) for answer in answers]
    assert np.mean([a == b for a, b in zip(predicted, truth, strict=True)]) == pytest.approx(
        results["test"]["exact_match"]
    )
    right = sum(len(a & b) for a, b in zip(predicted, truth, strict=True))
    f1 = 2 * right / (sum(map(len, predicted)) + sum(map(len, truth)))
    assert f1 == pytest.approx(results["test"]["micro_f1"])
    losses = [
        -np.log(p if name in classes else 1 - p)
        for answer, classes in zip(answers, truth, strict=True)
        for name, p in answer["probabilities"].items()
    ]
    assert np.mean(losses) == pytest.approx(results["test"]["loss"], rel=1e-4)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", "runs/topics-all")
    assert f"F1 (micro)               {results['test']['micro_f1']:.4f}" in capsys.readouterr().out

    tiny_runs.jaxpeft(root, "merge", "runs/topics-all", "merged-topics")
    config = json.loads((root / "merged-topics" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "code", "1": "long", "2": "odd"}


def test_packed_and_resumed(root, monkeypatch):
    """A packed run that is stopped during step 2 and continued ends as one that went through."""
    flags = f"{FLAGS} --data.packing true --data.max_length 24 --evaluation.before false"
    _, through = tiny_runs.train(root, f"--name topics-through {flags}")
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingBar, "advance", terminate)
    with pytest.raises(SystemExit):
        tiny_runs.train(root, f"--name topics-cut {flags}")
    monkeypatch.undo()
    _, resumed = tiny_runs.train(root, "--resume", "--config", "runs/topics-cut/config.yaml", "--name", "topics-cut")
    for what in ("test", "calibration", "best_step"):
        assert resumed[what] == through[what]


def test_the_lines_of_the_card_give_the_same_in_torch(root, monkeypatch):
    pytest.importorskip("peft", reason="needs peft: pip install -e '.[test]'")
    import torch

    tiny_runs.train(root, f"--name topics-torch {FLAGS} --evaluation.before false")
    monkeypatch.chdir(root)
    lines = (root / "runs/topics-torch/adapter/README.md").read_text().split("```python\n")[2].split("```")[0]
    scope = {}
    exec(lines.replace("'path/to/base'", "'base'").replace("path/to/", "runs/"), scope)
    assert scope["model"].config.problem_type == "multi_label_classification"
    with torch.no_grad():
        theirs = scope["model"](**scope["tokenizer"](["A call."], return_tensors="pt")).logits.sigmoid()[0]
    (ours,) = load_run("runs/topics-torch").predict(["A call."], top=None)
    names = scope["model"].config.id2label
    assert dict(ours.probabilities) == pytest.approx({names[i]: float(p) for i, p in enumerate(theirs)}, abs=1e-5)
