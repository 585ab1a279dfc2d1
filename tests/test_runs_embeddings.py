"""Whole runs of sentence embeddings: pairs, triplets and scored pairs; their answers, and their files in sentence-transformers."""

import csv
import json
import shutil

import numpy as np
import pytest
import tiny_runs

from jaxpeft.runs.load import load_run

pytestmark = pytest.mark.xdist_group("runs")

FIRST, SECOND, THIRD = (tiny_runs.SENTENCES[start : start + 30] for start in (0, 30, 60))
PAIRS = """
--task sentence-embeddings --model.name base --data.train_file pairs.tsv --data.test_file pairs.tsv --data.bucket_lengths [8,16]
"""
TRIPLETS = """
--task sentence-embeddings --model.name base --data.train_file triplets.jsonl --data.bucket_lengths [16] --adapter.dropout 0.1
--embedding.pooling cls --embedding.scale 10 --embedding.normalize false --training.batch_size 8 --training.micro_batch_size 4
"""
SCORED = """
--task sentence-embeddings --model.name base --data.train_file scored.csv --data.test_file scored.csv --data.text_column first
--data.text_pair_column second --data.label_column score --data.bucket_lengths [16] --adapter.method hira
"""
FULL = PAIRS + "--adapter.method full --training.num_steps 2 --training.learning_rate 1e-3"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The workplace with files of pairs, triplets and scored pairs."""
    root = tiny_runs.workplace(tmp_path_factory)
    if not (root / "pairs.tsv").exists():
        rows = zip(FIRST, SECOND, THIRD, strict=True)
        lines = [json.dumps({"anchor": a, "positive": b, "negative": c}) for a, b, c in rows]
        (root / "triplets.jsonl").write_text("\n".join(lines))
        pairs = [f"{a}\t{b}".replace('"', "") for a, b in zip(FIRST, SECOND, strict=True)]
        (root / "pairs.tsv").write_text("anchor\tpositive\n" + "\n".join(pairs))
        with (root / "scored.csv").open("w", newline="") as out:
            scores = [i % 7 / 7 for i in range(30)]
            csv.writer(out).writerows([["first", "second", "score"], *zip(FIRST, SECOND, scores, strict=True)])
    return root


def trained(root, name, flags):
    """A run, made once."""
    if not (root / "runs" / name / "results.json").exists():
        tiny_runs.train(root, f"--name {name} {flags}")
    return root / "runs" / name, json.loads((root / "runs" / name / "results.json").read_text())


def answers_to(root, run, file, *flags):
    output = root / f"{run}.jsonl"
    output.unlink(missing_ok=True)
    tiny_runs.jaxpeft(root, "predict", f"runs/{run}", "--file", file, "--output", str(output), *flags)
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_pairs(root):
    directory, results = trained(root, "embed-pairs", PAIRS)
    assert set(results["test"]) == {"loss", "mrr", "recall_at_1", "recall_at_10"}
    assert results["best_metric"] == "mrr"
    assert results["test"]["loss"] < results["before"]["loss"]
    assert results["compiled_shapes"] == ["8 x 16"]  # texts of four pairs
    tensors = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert tensors["task_type"] == "FEATURE_EXTRACTION"


def test_predict_gives_what_evaluate_counts(root):
    """The ranks of the second texts, from the embeddings that predict writes of both columns."""
    _, results = trained(root, "embed-pairs", PAIRS)
    first, second = (
        np.asarray([row["embedding"] for row in answers_to(root, "embed-pairs", "pairs.tsv", "--text_column", column)])
        for column in ("anchor", "positive")
    )
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-6)
    scores = first @ second.T
    ranks = (scores >= np.diagonal(scores)[:, None] - 1e-9).sum(1)
    assert np.mean(1 / ranks) == pytest.approx(results["test"]["mrr"], abs=1e-6)
    assert np.mean(ranks <= 1) == pytest.approx(results["test"]["recall_at_1"])


def test_predict_gives_the_cosines_that_evaluate_correlates(root):
    stats = pytest.importorskip("scipy.stats")
    _, results = trained(root, "embed-scored", SCORED)
    answers = answers_to(root, "embed-scored", "scored.csv", "--text_column", "first", "--text_pair_column", "second")
    found = [answer["cosine"] for answer in answers]
    with (root / "scored.csv").open(newline="") as lines:
        scores = [float(row["score"]) for row in csv.DictReader(lines)]
    assert stats.spearmanr(found, scores).statistic == pytest.approx(results["test"]["spearman"], abs=1e-6)
    assert results["best_metric"] == "spearman"
    assert [answer["text_pair"] for answer in answers] == SECOND


def test_answers_on_the_terminal(root, capsys):
    trained(root, "embed-pairs", PAIRS)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "predict", "runs/embed-pairs", "A call.")
    text, answer = capsys.readouterr().out.splitlines()
    assert text == "A call."
    assert answer.startswith("  16 values, norm 1.0000: ")
    tiny_runs.jaxpeft(root, "predict", "runs/embed-pairs", "A call.", "--pairs", "A call.")
    assert capsys.readouterr().out.splitlines()[1] == "  cosine 1.0000"


def test_a_csv_file_of_embeddings(root, tmp_path, monkeypatch):
    trained(root, "embed-triplets", TRIPLETS)
    output = tmp_path / "embeddings.csv"
    tiny_runs.jaxpeft(root, "predict", "runs/embed-triplets", "--file", "triplets.jsonl", "--output", str(output))
    with output.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == ["row", "text", "embedding"]
    monkeypatch.chdir(root)
    expected = load_run("runs/embed-triplets").predict(FIRST)
    np.testing.assert_array_equal(np.float32([json.loads(row["embedding"]) for row in rows]), np.stack(expected))
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).min() > 0.1  # --embedding.normalize false


def test_a_run_with_passes_resumes_as_it_was(root):
    """Triplets, eight rows a batch, four a pass: stopped after four steps, and gone on with."""
    directory, results = trained(root, "embed-triplets", TRIPLETS)
    again = root / "runs" / "embed-resumed"
    shutil.copytree(directory, again)
    config = (again / "config.yaml").read_text()
    (again / "config.yaml").write_text(config.replace("name: embed-triplets", "name: embed-resumed"))
    (again / "results.json").unlink()
    shutil.rmtree(again / "adapter")
    for checkpoint in (again / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > 4:
            shutil.rmtree(checkpoint)
    tiny_runs.jaxpeft(root, "train", "--config", str(again / "config.yaml"), "--resume")
    resumed = json.loads((again / "results.json").read_text())
    assert resumed["test"] == results["test"]
    assert results["micro_batch_tokens"] == 12 * 16


def test_evaluate_measures_with_the_flags_of_the_run(root, capsys):
    """Pooled by the first token, with a scale of its own."""
    _, results = trained(root, "embed-triplets", TRIPLETS)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", "runs/embed-triplets")
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-4:])
    titles = {"loss": "loss", "mrr": "mean reciprocal rank", "recall_at_1": "recall@1", "recall_at_10": "recall@10"}
    assert printed == {titles[name]: f"{value:.4f}" for name, value in results["test"].items()}


@pytest.mark.parametrize(
    ("name", "flags", "tolerance"),
    [("embed-pairs", PAIRS, 1e-5), ("embed-triplets", TRIPLETS, 1e-5), ("embed-full", FULL, 1e-5)],
)
def test_sentence_transformers_loads_what_is_written(name, flags, tolerance, root, tmp_path, monkeypatch):
    """The adapter's directory and the merged model give our embeddings, of texts of several lengths in one batch."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    directory, results = trained(root, name, flags)
    texts = ["A call.", *FIRST[:5], " ".join(FIRST[:3])]
    monkeypatch.chdir(root)
    ours = np.stack(load_run(directory).predict(texts))
    places = [root / results["export"]]
    if name != "embed-full":
        tiny_runs.jaxpeft(root, "merge", f"runs/{name}", str(tmp_path / "merged"))
        places.append(tmp_path / "merged")
    for place in places:
        model = sentence_transformers.SentenceTransformer(str(place), device="cpu")
        theirs = model.encode(texts, batch_size=4)
        np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(ours).max())
        assert model.max_seq_length == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task sentence-embeddings --data.name python-docs", "sentence-embeddings needs two texts in each row, and"),
        ("--task sentence-embeddings --data.train_file train.txt", "name the second column with data.text_pair_column"),
        (
            f"{PAIRS} --adapter.method head",
            "adapter.method 'head' trains only the head, and sentence-embeddings has none",
        ),
        (
            f"{PAIRS} --data.num_labels 2",
            "data.num_labels is for classification and multi-label, and sentence-embeddings cannot use it",
        ),
        (
            f"{PAIRS} --data.packing true",
            "data.packing is only for classification and multi-label and pair-scoring, and the task is sentence-em",
        ),
        (f"{PAIRS} --embedding.scale 0", "embedding.scale is 0.0; it must be above 0"),
        (
            f"{PAIRS} --training.metric spearman",
            "training.metric 'spearman' is not measured in this sentence embeddings",
        ),
        (f"{PAIRS} --data.negative_column n", "data.negative_column 'n' needs the text that belongs to the first one"),
        (
            "--task classification --data.train_file labels.tsv --embedding.pooling cls",
            "embedding.pooling cls is for sentence-",
        ),
        (
            "--task classification --data.train_file train.txt --data.negative_column n --data.text_pair_column p",
            "data.negative_column n is for sentence-embeddings, and the task is classification; leave it out",
        ),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, message, root, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        tiny_runs.train(root, f"--name refused --model.name base {flags}")
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_card_says_how_to_use_it(root):
    directory, _ = trained(root, "embed-pairs", PAIRS)
    card = (directory / "adapter" / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "SentenceTransformer('path/to/embed-pairs/adapter')" in card
    assert "An embedding is the mean of the tokens' vectors, divided by its length." in card
