"""Pair scoring: loss, metrics and answers; whole runs; and sentence-transformers' cross-encoder on the same rows."""

import csv
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_runs

from jaxpeft import load_run
from jaxpeft.config import DataConfig, RunConfig, TrainingConfig
from jaxpeft.data import Split, Splits
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar
from jaxpeft.runs.data import load_data
from jaxpeft.tasks import task_for
from jaxpeft.tasks.pair_scoring import PairScoring

pytestmark = pytest.mark.xdist_group("runs")

FLAGS = """
--task pair-scoring --model.name base --data.train_file queries.csv --data.validation_file ranked.csv --data.test_file ranked.csv
--data.text_column query --data.text_pair_column answer --data.label_column fits --data.max_length 24 --data.bucket_lengths [16]
--training.num_steps 4 --training.batch_size 8
"""


def split_of(queries, labels):
    return Split(list(queries), [f"text {i}" for i in range(len(labels))], np.asarray(labels, np.float32))


def splits_of(split, validation=None):
    return Splits(split, validation or split, None, 1, None, "rows of a test")


def test_the_loss_is_torch_s():
    import torch

    logits, labels = tiny.normal(0, 8, 1), np.random.default_rng(1).random(8).astype(np.float32)
    batch = {"labels": labels, "weights": np.array([1] * 6 + [0] * 2, np.float32)}
    total, weight = task_for("pair-scoring", 1).loss(jnp.asarray(logits), batch)
    expected = torch.nn.BCEWithLogitsLoss()(torch.tensor(logits[:6, 0]), torch.tensor(labels[:6]))
    assert float(total / weight) == pytest.approx(expected.item(), rel=1e-6)


class Data:
    """What `measure` reads of the data."""

    queries = np.array([0, 0, 1, 1, 1])


def test_metrics_by_hand():
    """Batches come sorted by length, so rows are not in their order; the labels have their numbers."""
    logits = np.array([[2.0], [-1.0], [3.0], [0.5], [-2.0], [9.0]])
    batch = {
        "labels": np.array([1, 0, 0, 1, 0, 0], np.float32),
        "weights": np.array([1, 1, 1, 1, 1, 0], np.float32),
        "rows": np.array([1, 0, 3, 2, 4, -1]),
    }
    task = task_for("pair-scoring", 1)
    outputs, labels = task.gathered(logits, batch)
    found = task.measure({"loss": 3.0, "weight": 6.0}, outputs, labels, Data)
    assert list(found) == ["loss", "ndcg_at_10", "mrr_at_10", "average_precision", "accuracy"]
    assert found["loss"] == 0.5
    assert found["mrr_at_10"] == pytest.approx((1 + 1 / 2) / 2)
    assert found["ndcg_at_10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert found["average_precision"] == pytest.approx((1 / 2 + 2 / 3) / 2)  # ranks 2 and 3 of all five
    assert found["accuracy"] == pytest.approx(4 / 5)


def test_a_ranking_needs_something_to_rank():
    single = split_of(["a", "b", "c", "d"], [1, 0, 1, 0])
    grouped = split_of(["a", "a", "c", "d"], [1, 0, 1, 0])
    task = task_for("pair-scoring", 1)
    assert task.for_splits(splits_of(grouped)).metrics[0] == "ndcg_at_10"
    assert task.for_splits(splits_of(single)).metrics == ("average_precision", "accuracy")
    assert task.for_splits(splits_of(grouped, single)).metrics == ("average_precision", "accuracy")
    assert task.data_notes(splits_of(grouped)) == [
        "2 of 3 queries of validation have no relevant text or only one text, and are left out of NDCG and MRR"
    ]
    assert task.data_notes(splits_of(single))[0].startswith("all queries of validation")
    with pytest.raises(InputError, match="'ndcg_at_10' is not measured in this pair scoring"):
        task.for_splits(splits_of(single)).check_metric("ndcg_at_10")


def test_answers():
    task = PairScoring(1)
    (answer,) = task.answers(np.array([[0.0]], np.float32), None, 5)
    assert answer == [("score", 0.5)]
    assert task.in_words(answer) == ["0.500"]
    assert task.as_record(answer) == {"score": 0.5}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(["a", "b"], None, np.array([1.0, 0.0])), r"needs two texts in each row.*data\.text_pair_column"),
        (split_of("ab", [1, 1]), r"each of the 2 train rows has a label of at least 0\.5; .*data\.label_column"),
        (split_of("ab", [0, 0.2]), r"none of the 2 train rows has a label of at least 0\.5"),
    ],
)
def test_rows_that_cannot_be_learned(split, message):
    with pytest.raises(InputError, match=message):
        task_for("pair-scoring", 1).check_data(splits_of(split))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"data": DataConfig(train_file="a.csv", label_names=["a", "b"])},
            "data.label_names is for classification and multi-label",
        ),
        (
            {"data": DataConfig(train_file="a.csv", regression=True)},
            "data.regression is for classification, and pair-scoring",
        ),
        ({"training": TrainingConfig(class_weights="balanced")}, "is for classification, and the task is pair-scoring"),
    ],
)
def test_flags_that_do_not_fit(section, message):
    with pytest.raises(InputError, match=message):
        RunConfig(task="pair-scoring", **{"data": DataConfig(train_file="a.csv"), **section})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The workplace with queries that have four texts each, and one that has no relevant text."""
    root = tiny_runs.workplace(tmp_path_factory)
    lines = tiny_runs.SENTENCES
    for name, start, number in (("queries.csv", 0, 12), ("ranked.csv", 12, 6)):
        with (root / name).open("w", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["query", "answer", "fits"])
            for i in range(start, start + number):
                texts = [lines[i][20:], *(lines[(i + 7 * k) % 90][: 20 + 9 * k] for k in (1, 2, 3))]
                order = np.random.default_rng(i).permutation(4)
                writer.writerows([[lines[i][:20], texts[k], int(k == 0 and i != start)] for k in order])
    return root


@pytest.fixture(scope="module")
def run(root):
    return tiny_runs.train(root, f"--name ranked {FLAGS}")


def rows_of(root):
    with (root / "ranked.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def answers_to(root, run):
    output = root / f"{run}-answers.jsonl"
    output.unlink(missing_ok=True)
    tiny_runs.jaxpeft(root, "predict", f"runs/{run}", "--file", "ranked.csv", "--output", str(output))
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_predict_gives_what_evaluate_counts(run, root, capsys):
    _, results = run
    answers, rows = answers_to(root, "ranked"), rows_of(root)
    assert [(a["text"], a["text_pair"]) for a in answers] == [(r["query"], r["answer"]) for r in rows]
    scores, labels = np.array([a["score"] for a in answers]), np.array([float(r["fits"]) for r in rows])
    losses = -np.log(np.where(labels > 0, scores, 1 - scores))
    assert np.mean(losses) == pytest.approx(results["test"]["loss"], rel=1e-4)
    assert np.mean((scores > 0.5) == (labels > 0)) == pytest.approx(results["test"]["accuracy"])
    ranks = []
    for query in dict.fromkeys(row["query"] for row in rows):
        mine = [i for i, row in enumerate(rows) if row["query"] == query]
        if labels[mine].any():
            ranks.append(1 + int((scores[mine] > scores[mine][labels[mine] > 0]).sum()))
    assert len(ranks) == 5
    assert np.mean([1 / rank for rank in ranks]) == pytest.approx(results["test"]["mrr_at_10"])
    assert results["best_metric"] == "ndcg_at_10"
    assert any("1 of 6 queries of test have no relevant text" in note for note in results["data_notes"])
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", "runs/ranked")
    shown = capsys.readouterr().out
    assert f"MRR@10                   {results['test']['mrr_at_10']:.4f}" in shown
    assert f"NDCG@10                  {results['test']['ndcg_at_10']:.4f}" in shown


def test_the_card_asks_about_a_pair(run, root, monkeypatch, capsys):
    pytest.importorskip("peft", reason="needs peft: pip install -e '.[test]'")
    import torch

    monkeypatch.chdir(root)
    card = (root / "runs/ranked/adapter/README.md").read_text()
    ours, theirs = (part.split("```")[0] for part in card.split("```python\n")[1:])
    assert f"run.predict([{PairScoring.example!r}], [{PairScoring.example_pair!r}])" in ours
    scope = {}
    exec(ours.replace("path/to/", "runs/"), {})
    exec(theirs.replace("'path/to/base'", "'base'").replace("path/to/", "runs/"), scope)
    ((name, score),) = load_run("runs/ranked").predict([PairScoring.example], [PairScoring.example_pair])[0]
    assert name == "score"
    with torch.no_grad():
        logits = scope["model"](**scope["inputs"]).logits
    assert score == pytest.approx(float(logits.sigmoid()), abs=1e-5)


def test_a_file_without_labels_is_answered(run, root, tmp_path, capsys):
    (tmp_path / "new.csv").write_text("query,answer\nHow?,So.\n")
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "predict", "runs/ranked", "--file", str(tmp_path / "new.csv"))
    assert set(json.loads(capsys.readouterr().out)) == {"row", "text", "text_pair", "score"}


def test_held_out_by_query_and_resumed(root, monkeypatch):
    """Without a validation file. A run that is stopped during step 2 and continued ends as one that went through."""
    flags = FLAGS.replace("--data.validation_file ranked.csv --data.test_file ranked.csv", "--evaluation.before false")
    _, through = tiny_runs.train(root, f"--name ranked-through {flags} --evaluation.max_batches 1")
    assert any("all rows of a fixed random 1 of 12 queries" in note for note in through["data_notes"])
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingBar, "advance", terminate)
    with pytest.raises(SystemExit):
        tiny_runs.train(root, f"--name ranked-cut {flags} --evaluation.max_batches 1")
    monkeypatch.undo()
    _, resumed = tiny_runs.train(root, "--resume", "--config", "runs/ranked-cut/config.yaml", "--name", "ranked-cut")
    assert resumed["test"] == through["test"]


def test_evaluated_rows_are_whole_queries(root, monkeypatch):
    monkeypatch.chdir(root)
    columns = {"text_column": "query", "text_pair_column": "answer", "label_column": "fits"}
    task, splits = load_data(DataConfig(train_file="queries.csv", **columns), "pair-scoring")
    assert isinstance(task, PairScoring)
    assert set(splits.train.texts).isdisjoint(splits.validation.texts)


def test_sentence_transformers_gives_the_same_numbers(run, root):
    """The merged model as a `CrossEncoder`: scores, loss, MRR and NDCG on the same rows."""
    st = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: pip install -e '.[test]'")
    import torch
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    _, results = run
    if not (root / "merged-ranked").exists():
        tiny_runs.jaxpeft(root, "merge", "runs/ranked", "merged-ranked")
    config = json.loads((root / "merged-ranked/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    model = st.CrossEncoder(str(root / "merged-ranked"), num_labels=1, max_length=24, device="cpu")
    model.tokenizer.model_max_length = 24
    rows, answers = rows_of(root), answers_to(root, "ranked")
    pairs = [(row["query"], row["answer"]) for row in rows]
    np.testing.assert_allclose(model.predict(pairs), [answer["score"] for answer in answers], atol=1e-5)
    labels = torch.tensor([float(row["fits"]) for row in rows])
    with torch.no_grad():
        loss = BinaryCrossEntropyLoss(model)([[query for query, _ in pairs], [text for _, text in pairs]], labels)
    assert results["test"]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    samples = [
        {
            "query": query,
            "positive": [row["answer"] for row in rows if row["query"] == query and row["fits"] == "1"],
            "negative": [row["answer"] for row in rows if row["query"] == query and row["fits"] == "0"],
        }
        for query in dict.fromkeys(row["query"] for row in rows)
    ]
    found = CrossEncoderRerankingEvaluator([sample for sample in samples if sample["positive"]], at_k=10)(model)
    assert results["test"]["mrr_at_10"] == pytest.approx(found["mrr@10"])
    assert results["test"]["ndcg_at_10"] == pytest.approx(found["ndcg@10"])
