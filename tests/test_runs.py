"""Whole runs, from flags to files, and the commands that work with them."""

import json
import os
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import tiny_runs
import torch_side
import yaml

from jaxpeft import InputError, load_model, load_run
from jaxpeft.config.files import read_config
from jaxpeft.quantization import is_quantized
from jaxpeft.report.console import TrainingBar
from jaxpeft.trees import leaf_paths

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(name="root")
def _root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.fixture(name="everything")
def _everything(root):
    return tiny_runs.everything(root)


@pytest.fixture(name="labels")
def _labels(root):
    return tiny_runs.labels(root)


def metrics(directory, split):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["split"] == split}


def adapter_bytes(directory):
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_its_files(everything):
    directory, results = everything
    assert sorted(path.name for path in directory.iterdir()) == [
        *("adapter", "checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "results.json"),
        *("sparsity.jsonl", "sparsity.png", "tensorboard"),
    ]
    adapter = ["README.md", "adapter_config.json", "adapter_model.safetensors", "sparsity.png"]
    assert sorted(path.name for path in (directory / "adapter").iterdir()) == adapter
    assert (directory / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(int(path.name) for path in (directory / "checkpoints").iterdir()) == [results["best_step"], 6][-1:]
    assert list((directory / "tensorboard").glob("events.*"))
    assert results["export_bytes"] == len(adapter_bytes(directory))


def test_its_numbers_are_of_the_run(everything):
    directory, results = everything
    tensors = torch_side.tensors_of(directory / "adapter")
    hira = {key: tensor for key, tensor in tensors.items() if "hira_" in key}
    assert len(hira) == 4
    assert all(np.count_nonzero(tensor) == round(tensor.size / 2) for tensor in hira.values())
    assert results["adapter_entries"] == sum(tensor.size for tensor in hira.values()) == 128
    assert results["adapter_entries_kept"] == 64
    assert results["parameters_trainable"] == sum(tensor.size for tensor in tensors.values())
    assert results["steps"] == 6
    train, validation = metrics(directory, "train"), metrics(directory, "validation")
    assert list(train) == [1, 2, 3, 4, 5, 6]
    assert list(validation) == [0, 2, 4, 6]
    assert [row["sparsity"] > 0 for row in train.values()] == [False, True, True, True, True, True]
    assert train[4]["sparsity"] == train[6]["sparsity"] == 0.5
    # Before its last pruning an adapter is not what was asked for.
    eligible = {step: row["loss"] for step, row in validation.items() if step >= 4}
    assert results["best_step"] == min(eligible, key=eligible.get)
    assert {"loss", "perplexity", "accuracy", "pseudo_perplexity"} == set(results["test"]) == set(results["before"])
    assert results["test"]["perplexity"] == pytest.approx(np.exp(results["test"]["loss"]))
    assert [len(example["after"]) for example in results["examples"]] == [1, 2]


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(everything, root, monkeypatch):
    """From the run's own config.yaml; SIGTERM comes during update 3, between two validations."""
    directory, results = everything
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    again = ("--config", "runs/everything/config.yaml", "--name", "interrupted")
    monkeypatch.setattr(TrainingBar, "advance", terminate)
    with pytest.raises(SystemExit) as stopped:
        tiny_runs.train(root, "", *again)
    monkeypatch.undo()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (root / "runs/interrupted/results.json").exists()
    with pytest.raises(
        InputError, match=r"has not finished; continue it with --config .*interrupted/config\.yaml --resume"
    ):
        load_run(root / "runs/interrupted")
    assert list(metrics(root / "runs/interrupted", "train")) == [1, 2, 3]

    resumed, after = tiny_runs.train(root, "--resume", *again)
    assert adapter_bytes(resumed) == adapter_bytes(directory)
    for what in ("before", "test", "best_step"):
        assert after[what] == results[what]
    for split in ("train", "validation"):
        whole, parts = metrics(directory, split), metrics(resumed, split)
        assert list(whole) == list(parts)
        for step, row in whole.items():
            assert {**parts[step], "tokens_per_second": None} == {**row, "tokens_per_second": None}


def test_its_config_is_what_was_asked_for(everything, root):
    directory, _ = everything
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["adapter"]["method"] == "hira"
    assert config["adapter"]["rank"] == 2
    assert config["pruning"]["sparsity"] == 0.5
    assert "resume" not in config
    assert read_config(directory / "config.yaml").run_name == "everything"


def test_early_stopping_keeps_the_best(labels, root):
    directory, results = labels
    losses = {step: row["loss"] for step, row in metrics(directory, "validation").items() if step}
    best = results["best_step"]
    assert best == min(losses, key=losses.get)
    assert results["steps"] == best + 2 == max(losses) < 40
    assert results["test"]["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert set(results["test"]) == {"loss", "accuracy", "f1", "matthews"}
    assert results["best_metric"] == "loss"
    assert {int(path.name) for path in (directory / "checkpoints").iterdir()} == {best, best + 2}


def test_labels_are_named_and_predicted_as_by_peft(labels, root, monkeypatch):
    import torch
    from transformers import AutoTokenizer

    monkeypatch.chdir(root)
    directory, results = labels
    assert results["label_names"] == ["expression", "statement"]
    texts = ["The continue statement.", "A call."]
    answers = load_run(directory).predict(texts)
    base = torch_side.load_torch(root / "base", "classification", num_labels=2)
    peft = torch_side.load_peft(base, directory / "adapter")
    inputs = AutoTokenizer.from_pretrained(root / "base")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = peft(**inputs).logits.softmax(-1).numpy()
    for answer, row in zip(answers, expected, strict=True):
        assert [name for name, _ in answer] == [results["label_names"][i] for i in np.argsort(-row)]
        np.testing.assert_allclose([p for _, p in answer], np.sort(row)[::-1], rtol=0, atol=1e-5)


def test_predict_fills_every_mask(everything, root, capsys):
    _, results = everything
    text = tiny_runs.EXAMPLES[1]
    tiny_runs.jaxpeft(root, "predict", "runs/everything", text, "One [MASK].", "--top", "3")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        text,
        "  mask 1",
        "  mask 2",
        "One [MASK].",
        lines[-1].split(":")[0],
    ]
    shown = [answer.rsplit(" ", 2)[0] for answer in lines[1].removeprefix("  mask 1: ").split(", ")]
    assert shown == [token for token, _ in results["examples"][1]["after"][0]]


def test_predict_names_labels(labels, root, capsys):
    tiny_runs.jaxpeft(root, "predict", "runs/labels", "The pass statement.")
    text, answer = capsys.readouterr().out.splitlines()
    assert text == "The pass statement."
    assert re.fullmatch(r"  (statement|expression) [\d.]+ %, (statement|expression) [\d.]+ %", answer)


def test_evaluate_measures_what_the_run_did(everything, labels, root, capsys):
    tiny_runs.jaxpeft(
        root, "evaluate", "runs/everything", "--pseudo_perplexity", "true", "--pseudo_perplexity_rows", "2"
    )
    shown = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    test = everything[1]["test"]
    assert {key.strip(): value for key, value in shown.items()} == {
        "loss": f"{test['loss']:.4f}",
        "perplexity": f"{test['perplexity']:,.1f}",
        "accuracy": f"{test['accuracy']:.4f}",
        "pseudo-perplexity": f"{test['pseudo_perplexity']:,.1f}",
    }
    tiny_runs.jaxpeft(root, "evaluate", "runs/everything", "--split", "validation")
    best = metrics(everything[0], "validation")[everything[1]["best_step"]]
    assert f" {best['loss']:.4f}" in capsys.readouterr().out
    tiny_runs.jaxpeft(root, "evaluate", "runs/labels")
    assert "no labelled test split" in capsys.readouterr().out


def test_merge_writes_a_model_that_answers_the_same(everything, labels, root, monkeypatch):
    from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, pipeline

    monkeypatch.chdir(root)
    tiny_runs.jaxpeft(root, "merge", "runs/everything", "merged")
    model, loading = AutoModelForMaskedLM.from_pretrained("merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    text = "The [MASK] statement."
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("merged")
    theirs = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(text)
    ours = load_run("runs/everything").predict([text])[0][0]
    assert [answer["token_str"].replace("##", "") for answer in theirs] == [
        token.replace("##", "") for token, _ in ours
    ]
    np.testing.assert_allclose([a["score"] for a in theirs], [p for _, p in ours], rtol=0, atol=1e-5)

    tiny_runs.jaxpeft(root, "merge", "runs/labels", "merged-labels")
    config = AutoModelForSequenceClassification.from_pretrained("merged-labels").config
    assert config.id2label == {0: "expression", 1: "statement"}


def test_merge_can_quantise_the_sum_again(everything, labels, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    tiny_runs.jaxpeft(root, "merge", "runs/everything", "merged-again", "--requantize", "true")
    assert "warning: merging into a quantised base quantises the sum again" in capsys.readouterr().out
    run = load_run("runs/everything")
    merged = load_model("merged-again", "masked-lm")
    for path, leaf in leaf_paths(merged.params).items():
        assert is_quantized(leaf) == is_quantized(leaf_paths(run.frozen).get(path))
    with pytest.raises(SystemExit) as caught:
        tiny_runs.jaxpeft(root, "merge", "runs/labels", "merged-labels-again", "--requantize", "true")
    assert caught.value.code == 2
    assert "the base of 'runs/labels' is not quantised" in capsys.readouterr().err


@pytest.mark.slow
def test_a_test_of_some_rows_is_of_so_many_and_says_so(root):
    flags = (
        "--data.test_file labels.tsv --evaluation.batch_size 4 --evaluation.max_test_batches 1 --training.num_steps 2"
    )
    directory, results = tiny_runs.train(root, f"{tiny_runs.LABELS.replace('labels', 'some-rows', 1)} {flags}")
    assert "tested on 4 rows at most" in results["data_notes"]
    assert "tested on 4 rows at most" in (directory / "adapter" / "README.md").read_text()
    assert results["test_split"] == "test"
    assert results["test"]["accuracy"] in (0, 0.25, 0.5, 0.75, 1)


def test_regression_with_every_weight(root, monkeypatch, capsys):
    directory, results = tiny_runs.scores(root)
    assert set(results["test"]) == {"loss", "pearson", "spearman"}
    assert results["before"] == {}
    assert results["parameters_trainable"] == results["parameters_total"]
    assert results["num_labels"] == 1
    assert not (directory / "adapter").exists()
    monkeypatch.chdir(root)
    texts = ["A call.", "The continue statement."]
    ours = [answer[0] for answer in load_run("runs/scores").predict(texts)]
    assert [name for name, _ in ours] == ["value", "value"]
    from transformers import AutoTokenizer

    model = torch_side.load_torch(directory / "model", "classification")
    inputs = AutoTokenizer.from_pretrained(directory / "model")(texts, padding=True, return_tensors="np")
    theirs = torch_side.torch_logits(model, dict(inputs))[:, 0]
    np.testing.assert_allclose([value for _, value in ours], theirs, rtol=0, atol=1e-5)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", "runs/scores")
    assert f"{results['test']['loss']:.4f}" in capsys.readouterr().out
    tiny_runs.jaxpeft(root, "merge", "runs/scores", "merged-scores")
    assert (root / "merged-scores" / "model.safetensors").read_bytes() == (
        directory / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_only_a_head_on_random_weights(root, monkeypatch):
    directory, output = tiny_runs.head_on_random_weights(root)
    assert "Traceback" not in output
    assert set(torch_side.tensors_of(directory / "adapter")) == {
        "base_model.model.cls.predictions.bias",
        *(f"base_model.model.cls.predictions.transform.{name}" for name in ("dense.weight", "dense.bias")),
        *(f"base_model.model.cls.predictions.transform.LayerNorm.{name}" for name in ("weight", "bias")),
    }
    results = json.loads((directory / "results.json").read_text())
    assert results["adapter_entries"] == 0
    # The base that was drawn lies beside the adapter: other programs would draw other last digits.
    base = torch_side.load_torch(directory / "base")
    peft = torch_side.load_peft(base, directory / "adapter")
    monkeypatch.chdir(root)
    run = load_run("runs/head")
    inputs = dict(run.tokenizer(["A [MASK]."], return_tensors="np"))
    theirs = torch_side.torch_logits(peft, inputs)[0, 2]
    probabilities = np.exp(theirs - theirs.max()) / np.exp(theirs - theirs.max()).sum()
    ours = run.predict(["A [MASK]."], top=5)[0][0]
    np.testing.assert_allclose([p for _, p in ours], np.sort(probabilities)[::-1][:5], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_what_a_run_says_to_type_next_works(root, capsys):
    _, output = tiny_runs.head_on_random_weights(root)
    command = re.search("python -m jaxpeft (predict .*)", output)[1]
    capsys.readouterr()
    tiny_runs.jaxpeft(root, *shlex.split(command))
    assert " %" in capsys.readouterr().out


def resumed_copy(root, name):
    copy = root / "runs" / f"{name}-copy"
    shutil.copytree(root / "runs" / name, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "name": copy.name}))
    return tiny_runs.train(root, "--resume", "--config", f"runs/{copy.name}/config.yaml", "--name", copy.name)


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(everything, root):
    directory, results = everything
    copy, again = resumed_copy(root, "everything")
    assert adapter_bytes(copy) == adapter_bytes(directory)
    assert (again["test"], again["steps"]) == (results["test"], results["steps"])


def test_resuming_a_run_that_stopped_early_changes_nothing(labels, root):
    directory, results = labels
    copy, again = resumed_copy(root, "labels")
    assert adapter_bytes(copy) == adapter_bytes(directory)
    assert again["steps"] == results["steps"]
