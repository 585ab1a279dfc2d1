"""`predict` gives the answers that `evaluate` counts, because both make the same rows of a text; and its files."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs

from jaxpeft.data import Split
from jaxpeft.errors import InputError
from jaxpeft.runs.load import load_run

pytestmark = pytest.mark.xdist_group("runs")

PAIRS = """
--task classification --model.name left --data.train_file pairs.csv --data.test_file pairs.csv --data.text_column first
--data.text_pair_column second --data.max_length 12 --data.bucket_lengths [8] --training.num_steps 2
"""
SINGLE = """
--task classification --model.name left --data.train_file labels.tsv --data.test_file labels.tsv --data.max_length 12
--training.num_steps 2
"""
NUMBERS = SINGLE.replace("labels.tsv", "scores.csv")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The workplace with a base whose tokenizer pads and cuts at the left, and a file of pairs."""
    root = tiny_runs.workplace(tmp_path_factory)
    shutil.copytree(root / "base", root / "left")
    file = root / "left" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left", "truncation_side": "left"}))
    with (root / "pairs.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["first", "second", "label"])
        for i, line in enumerate(tiny_runs.SENTENCES[:41]):
            writer.writerow([line, tiny_runs.SENTENCES[i + 1][: 5 * i], "even" if i % 2 else "odd"])
    return root


def answers_to(root, run, file, *flags):
    output = root / f"{run}.jsonl"
    output.unlink(missing_ok=True)
    tiny_runs.jaxpeft(root, "predict", f"runs/{run}", "--file", file, "--output", str(output), *flags)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize(("name", "flags", "file"), [("pairs", PAIRS, "pairs.csv"), ("single", SINGLE, "labels.tsv")])
def test_predict_gives_what_evaluate_counts(name, flags, file, root, capsys):
    """Left padding, left truncation, rows longer than 12 tokens: accuracy and loss of the answers are those of the evaluation."""
    _, results = tiny_runs.train(root, f"--name predict-{name} {flags}")
    answers = answers_to(root, f"predict-{name}", file)
    assert "were longer than 12 tokens and were cut" in capsys.readouterr().err
    with (root / file).open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t" if file.endswith("tsv") else ","))
    assert [answer["row"] for answer in answers] == list(range(1, len(rows) + 1))
    assert [answer["text"] for answer in answers] == [row["first" if name == "pairs" else "text"] for row in rows]
    right = [answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right) == pytest.approx(results["test"]["accuracy"], abs=1e-9)
    losses = [-np.log(answer["probabilities"][row["label"]]) for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(losses) == pytest.approx(results["test"]["loss"], abs=1e-5)


def test_numbers_are_what_evaluate_measures(root):
    _, results = tiny_runs.train(root, f"--name predict-numbers {NUMBERS}")
    answers = answers_to(root, "predict-numbers", "scores.csv")
    with (root / "scores.csv").open(newline="") as lines:
        targets = [float(row["label"]) for row in csv.DictReader(lines)]
    errors = [(answer["value"] - target) ** 2 for answer, target in zip(answers, targets, strict=True)]
    assert np.mean(errors) == pytest.approx(results["test"]["loss"], rel=1e-5)


def test_a_run_on_pairs_asks_for_pairs(root, monkeypatch):
    tiny_runs.train(root, f"--name asks-for-pairs {PAIRS}")
    monkeypatch.chdir(root)
    run = load_run("runs/asks-for-pairs")
    with pytest.raises(
        InputError, match=r"trained on pairs of texts, and it is asked about a single text \('A call\.'\)"
    ):
        run.predict(["A call."])
    assert len(run.predict(["A call."], ["A name."], top=None)[0]) == 2


def test_a_run_on_single_texts_takes_no_pairs(root, monkeypatch):
    tiny_runs.labels(root)
    monkeypatch.chdir(root)
    run = load_run("runs/labels")
    with pytest.raises(
        InputError, match="trained on single texts, and it is asked about pairs: give one text for each"
    ):
        run.predict(["A call."], ["A name."])


def test_answers_do_not_depend_on_the_other_texts(root, monkeypatch):
    """A thousand texts are several chunks; each answer is that of the text alone."""
    tiny_runs.labels(root)
    monkeypatch.chdir(root)
    monkeypatch.setattr("jaxpeft.runs.load._TEXTS_PER_CHUNK", 7)
    run = load_run("runs/labels")
    texts = tiny_runs.SENTENCES[:20]
    together = run.predict(texts)
    assert [len(reply.answers) for reply in run.replies(Split(texts))] == [7, 7, 6]
    for text, answer in list(zip(texts, together, strict=True))[::6]:
        alone = dict(run.predict([text])[0])
        assert dict(answer) == pytest.approx(alone, abs=1e-6)


def test_masks_of_a_file(root, tmp_path, capsys):
    tiny_runs.everything(root)
    texts = [*tiny_runs.EXAMPLES, "One [MASK]."]
    capsys.readouterr()
    (tmp_path / "masks.txt").write_text("\n".join(texts))
    tiny_runs.jaxpeft(root, "predict", "runs/everything", "--file", str(tmp_path / "masks.txt"), "--top", "2")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(record["masks"]) for record in found] == [1, 2, 1]
    assert all(len(tokens) == 2 for record in found for tokens in record["masks"])
    (tmp_path / "none.txt").write_text("One [MASK].\nNo mask.")
    with pytest.raises(SystemExit) as caught:
        tiny_runs.jaxpeft(root, "predict", "runs/everything", "--file", str(tmp_path / "none.txt"))
    assert caught.value.code == 2
    assert "none.txt, row 2: 'No mask.' has no [MASK] to fill" in capsys.readouterr().err


def test_a_csv_file_of_answers(root, tmp_path):
    tiny_runs.labels(root)
    output = tmp_path / "answers.csv"
    tiny_runs.jaxpeft(root, "predict", "runs/labels", "--file", "labels.tsv", "--output", str(output))
    with output.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = ["probabilities.expression", "probabilities.statement"]
    assert sorted(rows[0]) == sorted(["row", "text", "label", "probability", *names])
    assert all(float(row[f"probabilities.{row['label']}"]) == float(row["probability"]) for row in rows)
    assert [row["text"] for row in rows] == tiny_runs.SENTENCES[:40]


def test_some_answers_in_a_csv_file(root, tmp_path):
    """Of each text other labels are the likeliest, so they cannot be columns."""
    tiny_runs.labels(root)
    output = tmp_path / "answers.csv"
    tiny_runs.jaxpeft(root, "predict", "runs/labels", "--file", "labels.tsv", "--output", str(output), "--top", "1")
    with output.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["label"] for row in rows} <= {"statement", "expression"}
    assert all(json.loads(row["probabilities"]) == {row["label"]: float(row["probability"])} for row in rows)


def test_a_run_answers_without_its_token_cache(root, monkeypatch, tmp_path):
    """The machine that serves a run need not have the directories of the one that trained it."""
    directory, _ = tiny_runs.labels(root)
    copy = shutil.copytree(directory, tmp_path / "copy")
    config = (copy / "config.yaml").read_text()
    assert "token_cache: auto" in config
    (copy / "config.yaml").write_text(config.replace("token_cache: auto", "token_cache: /proc/no/such/place"))
    monkeypatch.chdir(root)
    assert load_run(copy).predict(["A call."]) == load_run(directory).predict(["A call."])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give texts, each in quotes, or --file with a file of them"),
        (["A call.", "--file", "labels.tsv"], "give texts, each in quotes, or --file with a file of them"),
        (["A call.", "--output", "a.jsonl"], "--output is for texts of a file; give --file"),
        (["A call.", "--pairs", "a", "b"], "1 texts and 2 --pairs; give a second text for each"),
        (["--file", "labels.tsv", "--output", "a.txt"], "--output a.txt: the format '.txt' is unknown"),
        (["--file", "labels.tsv", "--output", "labels.csv"], "--output labels.csv exists; remove it"),
        (["--file", "labels.tsv", "--output", "no/a.csv"], "there is no directory"),
        (["--file", "nothing.csv"], "nothing.csv"),
        (["A call.", "--top", "0"], "--top is 0; it must be at least 1"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, message, root, capsys):
    tiny_runs.labels(root)
    (root / "labels.csv").write_text("kept")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        tiny_runs.jaxpeft(root, "predict", "runs/labels", *flags)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (root / "labels.csv").read_text() == "kept"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(root, tmp_path):
    """100,000 rows in at most 1.3 times the memory of 1,000."""
    tiny_runs.labels(root)
    peaks = {}
    for rows in (1_000, 100_000):
        file, output = tmp_path / f"{rows}.csv", tmp_path / f"{rows}.jsonl"
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([["text"], *([f"{tiny_runs.SENTENCES[i % 90]} {i}"] for i in range(rows))])
        command = [sys.executable, "-m", "jaxpeft", "predict", "runs/labels", "--file", file, "--output", output]
        process = subprocess.Popen(command, cwd=root, env=tiny_runs.environment())
        _, process.returncode, usage = os.wait4(process.pid, 0)
        assert process.returncode == 0
        peaks[rows] = usage.ru_maxrss
        with output.open() as lines:
            assert sum(1 for _ in lines) == rows
    assert peaks[100_000] <= 1.3 * peaks[1_000]
