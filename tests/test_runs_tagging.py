"""Whole runs of token classification: answers are what was counted, files of both kinds, resuming, merging, other bases and methods."""

import contextlib
import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import tiny_runs
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

from jaxpeft.config.files import read_config
from jaxpeft.data.conll import read_tagged_file
from jaxpeft.preflight.abstract_run import abstract_run, lower_evaluation, lower_training
from jaxpeft.report.console import TrainingBar
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.runs.load import load_run
from jaxpeft.runs.sweep import run_together
from jaxpeft.training.sharding import data_parallel

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(name="root")
def _root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.fixture(name="run")
def _run(root):
    return tiny_runs.entities(root)


def answers_to(root, file, capsys, *flags):
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "predict", "runs/entities", "--file", str(file), *flags)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_predict_gives_what_evaluate_counts(run, root, capsys):
    directory, results = run
    table = read_tagged_file(str(root / "entities.conll"))
    answers = answers_to(root, "entities.conll", capsys)
    assert [answer["text"] for answer in answers] == [answer["words"] for answer in answers] == list(table["tokens"])
    true, predicted = list(table["tags"]), [answer["tags"] for answer in answers]
    assert all(tags[0] == "O" for tags in predicted)  # the word without a token
    scores = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    expected = {name: score(true, predicted, zero_division=0) for name, score in scores.items()}
    expected["accuracy"] = accuracy_score(true, predicted)
    assert {name: results["test"][name] for name in expected} == pytest.approx(expected)
    assert 0 < results["test"]["f1"] < 1  # so that the comparison above means something
    assert results["best_metric"] == "f1"
    by_name = {each["name"]: each for each in results["classes"]}
    for name in ("CODE", "NAME"):
        assert by_name[name]["predicted"] == sum(span["type"] == name for answer in answers for span in answer["spans"])
    assert by_name["SIGN"]["rows"] == 24
    assert by_name["SIGN"]["recall"] == 0
    assert results["label_names"][0] == "O"
    assert not (directory / "confusion.png").exists()


def test_evaluate_measures_what_the_run_did(run, root, capsys):
    _, results = run
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", "runs/entities")
    printed = capsys.readouterr().out
    assert f"entity F1                {results['test']['f1']:.4f}" in printed
    assert f"word accuracy            {results['test']['accuracy']:.4f}" in printed
    assert "CODE" in printed


def test_texts_and_files_of_them(run, root, tmp_path, capsys, monkeypatch):
    texts = ["The print() function.", "A [list] of lists"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    (tmp_path / "texts.csv").write_text("n,text\n" + "\n".join(f"1,{text}" for text in texts))
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"tokens": text.split()}) + "\n" for text in texts))
    lines, rows = (answers_to(root, tmp_path / f"texts.{kind}", capsys) for kind in ("txt", "csv"))
    assert lines == rows
    for answer in lines:
        for span in answer["spans"]:
            assert answer["text"][span["start"] : span["end"]] == span["text"]
    words = answers_to(root, tmp_path / "words.jsonl", capsys)
    assert [answer["words"] for answer in words] == [text.split() for text in texts]
    monkeypatch.chdir(root)
    (answer, _) = load_run("runs/entities").predict(texts)
    assert list(answer.tags) == lines[0]["tags"]
    tiny_runs.jaxpeft(root, "predict", "runs/entities", "--file", "entities.conll", "--output", str(tmp_path / "a.csv"))
    with (tmp_path / "a.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert len(json.loads(first["words"])) == len(json.loads(first["tags"]))


def test_top_means_nothing_for_words(run, root, capsys):
    with pytest.raises(SystemExit):
        tiny_runs.jaxpeft(root, "predict", "runs/entities", "A text.", "--top", "2")
    assert (
        "--top 2 chooses among several answers, and token-classification gives one; leave it out"
        in capsys.readouterr().err
    )


def test_the_card_says_how_it_was_counted(run):
    directory, _ = run
    card = (directory / "adapter" / "README.md").read_text()
    assert "seqeval in its default mode" in card
    assert "Sentences of more than 16 tokens are read in windows" in card
    assert "AutoModelForTokenClassification" in card
    assert " tags in the scheme IOB2; they are trained as they are" in card
    assert json.loads((directory / "adapter/labels.json").read_text())["id2label"]["0"] == "O"


def test_a_resumed_run_goes_on_as_if_nothing_had_been(run, root, monkeypatch):
    _, results = run
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    again = ("--config", "runs/entities/config.yaml", "--name", "entities-interrupted")
    monkeypatch.setattr(TrainingBar, "advance", terminate)
    with pytest.raises(SystemExit):
        tiny_runs.train(root, tiny_runs.ENTITIES.replace("--name entities", ""), *again)
    monkeypatch.undo()
    _, after = tiny_runs.train(root, tiny_runs.ENTITIES.replace("--name entities", "--resume"), *again)
    assert after["test"] == results["test"]
    losses = [
        [row["loss"] for row in read_metrics(root / "runs" / name / "metrics.jsonl") if row["split"] == "train"]
        for name in ("entities", "entities-interrupted")
    ]
    assert losses[0] == losses[1]


def test_the_merged_model_is_torch_s(run, root, monkeypatch):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    monkeypatch.chdir(root)
    if not (root / "merged-entities").exists():
        tiny_runs.jaxpeft(root, "merge", "runs/entities", "merged-entities")
    model = AutoModelForTokenClassification.from_pretrained("merged-entities").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged-entities")
    words = ["The", "print(", ")", "function", "of", "Python"]
    inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        ids = model(**inputs).logits[0].argmax(-1).tolist()
    theirs = [model.config.id2label[ids[inputs.word_to_tokens(i).start]] for i in range(len(words))]
    (answer,) = load_run("runs/entities").predict([words])
    assert list(answer.tags) == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--adapter.method hira --model.quantization nf4 --pruning.sparsity 0.5 --training.accumulation_steps 2",
        "--adapter.method prompt-tuning --adapter.num_virtual_tokens 3",
        "--adapter.method full --adapter.rank null",
        "--model.quantization int8 --adapter.use_dora true --training.micro_batch_size 4 --evaluation.max_batches 2",
        "--contextual.ffn_sparsity 0.5 --adapter.dropout 0.1",
    ],
    ids=["sparse-hira-nf4", "prompt-tuning", "full", "dora-int8", "contextual"],
)
def test_other_methods_and_bases(flags, root, request):
    name = f"entities-{request.node.callspec.id}"
    more = "--training.num_steps 4 --training.eval_every_steps 2 --training.learning_rate 1e-2"
    _, results = tiny_runs.train(
        root, f"{tiny_runs.ENTITIES} --name {name} {more} {flags}".replace("--name entities ", "")
    )
    assert set(results["test"]) == {"loss", "f1", "precision", "recall", "accuracy"}
    with contextlib.chdir(root):
        (answer,) = load_run(f"runs/{name}").predict(["The print() function."])
    assert len(answer.tags) == len(answer.words)


@pytest.mark.slow
def test_tags_without_a_scheme(root, monkeypatch):
    words = [line.split() for line in tiny_runs.SENTENCES[:24]]
    rows = [{"tokens": each, "upos": ["LONG" if len(word) > 5 else "SHORT" for word in each]} for each in words]
    (root / "tags.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = tiny_runs.ENTITIES.replace("--name entities", "--name tags").replace("entities.conll", "tags.jsonl")
    directory, results = tiny_runs.train(root, flags)
    assert results["best_metric"] == "accuracy"
    assert set(results["test"]) == {"loss", "accuracy", "f1"}
    assert [each["name"] for each in results["classes"]] == ["LONG", "SHORT"]
    assert sum(map(sum, results["confusion"])) == sum(map(len, words))
    assert (directory / "confusion.png").exists()
    monkeypatch.chdir(root)
    (answer,) = load_run("runs/tags").predict([words[0]])
    assert {span.type for span in answer.spans} <= {"LONG", "SHORT"}


@pytest.mark.slow
def test_runs_in_one_program(run, root):
    """Two seeds together: the first ends as it does by itself."""
    directory, results = run
    with contextlib.chdir(root):
        config = read_config(directory / "config.yaml")
        wanted = [replace(config, name=f"entities-together-{seed}", seed=seed) for seed in (0, 1)]
        first, second = run_together(wanted)
    assert first.test == pytest.approx(results["test"], abs=1e-4)
    assert second.test != first.test


def test_preflight_lowers_the_steps_of_the_run(run, root):
    directory, results = run
    with contextlib.chdir(root):
        abstract = abstract_run(read_config(directory / "config.yaml"), data_parallel())
        assert abstract.lengths == (8, 16)
        lower_training(abstract, 4, 16)
        lower_evaluation(abstract, 8, 8)
    assert set(results["compiled_shapes"]) <= {"4 x 8", "4 x 16"}


def test_a_file_without_sentences_to_tag_is_refused(run, root, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        answers_to(root, tmp_path / "a.csv", capsys)
    assert "no column is known to hold words (a, b); give data.text_column" in capsys.readouterr().err
