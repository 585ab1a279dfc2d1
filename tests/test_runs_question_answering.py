"""A whole run that answers questions: its figures, its threshold, its answers, and its end after an interruption."""

import json
import os
import re
import shlex
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import tiny_runs

from jaxpeft.config.parsing import parse_run
from jaxpeft.data import read_question_file
from jaxpeft.errors import InputError
from jaxpeft.preflight.abstract_run import abstract_run, lower_evaluation, lower_training
from jaxpeft.report.console import TrainingBar
from jaxpeft.runs.load import load_run
from jaxpeft.runs.sweep import run_together
from jaxpeft.tasks.base import for_device
from jaxpeft.tasks.squad_metrics import scores
from jaxpeft.training.sharding import data_parallel

pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.fixture(scope="module")
def run(root):
    return tiny_runs.questions(root)


def test_the_figures_are_squad_s(run):
    _, results = run
    names = {"loss", "f1", "exact_match"} | {
        f"{a}_{m}" for a in ("has_answer", "no_answer") for m in ("f1", "exact_match")
    }
    assert set(results["test"]) == set(results["before"]) == names
    assert results["best_metric"] == "f1"
    assert results["calibration"].keys() == {"null_threshold"}
    assert results["reads_pairs"]
    assert results["torch_class"] == "BertForQuestionAnswering"
    assert any("have no answer in their context (SQuAD 2.0)" in note for note in results["data_notes"])
    assert any("contexts" in note and "held out" in note for note in results["data_notes"])
    assert {"4 x 32"} <= set(results["compiled_shapes"]) <= {"4 x 24", "4 x 32"}


def test_predict_gives_what_evaluate_counts(root, run, tmp_path, capsys):
    directory, results = run
    output = tmp_path / "answers.jsonl"
    tiny_runs.jaxpeft(root, "predict", str(directory), "--file", "questions.json", "--output", str(output))
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    table = read_question_file(str(root / "questions.json"))
    assert [answer["text"] for answer in answers] == table["question"][:]
    assert [answer["text_pair"] for answer in answers] == table["context"][:]
    right = [row["text"] for row in table["answers"][:]]
    exact, f1 = scores([answer["answer"] for answer in answers], right)
    has_answer = np.array([bool(texts) for texts in right])
    assert 0 < has_answer.mean() < 1
    assert f1.mean() == pytest.approx(results["test"]["f1"], abs=1e-9)
    assert exact.mean() == pytest.approx(results["test"]["exact_match"], abs=1e-9)
    assert f1[has_answer].mean() == pytest.approx(results["test"]["has_answer_f1"], abs=1e-9)
    assert exact[~has_answer].mean() == pytest.approx(results["test"]["no_answer_exact_match"], abs=1e-9)
    threshold = results["calibration"]["null_threshold"]
    for answer, context in zip(answers, table["context"][:], strict=True):
        if answer["start"] is None:
            assert (answer["answer"], answer["score"]) == ("", answer["no_answer"])
        else:
            assert context[answer["start"] : answer["end"]] == answer["answer"] != ""
            assert np.log(answer["no_answer"] / answer["score"]) <= threshold + 1e-4
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", str(directory))
    printed = capsys.readouterr().out
    assert re.search(rf"^F1 +{results['test']['f1']:.4f}$", printed, re.MULTILINE)
    assert re.search(
        rf"^exact match of questions without an answer {results['test']['no_answer_exact_match']:.4f}$",
        printed,
        re.MULTILINE,
    )


def test_questions_of_the_command_line(root, run, capsys, monkeypatch):
    directory, _ = run
    context = tiny_runs.SENTENCES[0]
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "predict", str(directory), "After the?", "--pairs", context, "--top", "2")
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "After the?"
    assert sum(line.startswith("  no answer: ") for line in said) == 1
    places = re.findall(r"  '(.+)', characters (\d+) to (\d+): \d+\.\d %", "\n".join(said))
    assert len(places) == 2
    assert all(context[int(start) : int(end)] == text for text, start, end in places)
    monkeypatch.chdir(root)
    with pytest.raises(InputError, match="trained on pairs of texts, and it is asked about a single text"):
        load_run(directory).predict(["After the?"])


def test_a_csv_file_of_answers(root, run, tmp_path):
    output = tmp_path / "answers.csv"
    tiny_runs.jaxpeft(root, "predict", str(run[0]), "--file", "questions.json", "--output", str(output))
    assert output.read_text().splitlines()[0] == "row,text,text_pair,answer,start,end,score,no_answer"


def test_a_question_that_is_too_long_has_its_row(root, run, capsys, tmp_path):
    rows = [{"question": "After the?", "context": "The end."}, {"question": "why " * 40, "context": "The end."}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as caught:
        tiny_runs.jaxpeft(root, "predict", str(run[0]), "--file", str(tmp_path / "long.jsonl"))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "long.jsonl, row 2: the question 'why why" in error
    assert "shorten it, or raise data.max_length" in error


def test_what_the_run_says_to_type_next_works(root, run, capsys, monkeypatch):
    directory, _ = run
    copy = root / "runs" / "questions-copy"
    shutil.copytree(directory, copy)
    config = (copy / "config.yaml").read_text().replace("name: questions\n", "name: questions-copy\n")
    (copy / "config.yaml").write_text(config)
    capsys.readouterr()
    tiny_runs.train(root, "--resume", "--config", f"runs/{copy.name}/config.yaml", "--name", copy.name)
    command = re.search("python -m jaxpeft (predict .*)", capsys.readouterr().out)[1]
    tiny_runs.jaxpeft(root, *shlex.split(command))
    assert "Who wrote the play?" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(root, run, monkeypatch):
    directory, results = run
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    flags = tiny_runs.QUESTIONS.replace("--name questions", "--name questions-stopped")
    monkeypatch.setattr(TrainingBar, "advance", terminate)
    with pytest.raises(SystemExit):
        tiny_runs.train(root, flags)
    monkeypatch.undo()
    resumed, after = tiny_runs.train(root, f"{flags} --resume")
    files = [folder / "adapter/adapter_model.safetensors" for folder in (directory, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {name: after[name] for name in ("before", "test", "calibration")} == {
        name: results[name] for name in ("before", "test", "calibration")
    }


METHODS = {
    "prompt-tuning": "--adapter.num_virtual_tokens 2 --data.max_length 28",
    "hira": "--model.quantization nf4 --pruning.sparsity 0.5 --training.accumulation_steps 2",
    "full": "--training.batch_size 8 --training.micro_batch_size 4 --training.metric exact_match",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_other_methods(method, root, monkeypatch):
    flags = tiny_runs.QUESTIONS.replace("--name questions", f"--name questions-{method} --adapter.method {method}")
    directory, results = tiny_runs.train(root, flags, *METHODS[method].split())
    monkeypatch.chdir(root)
    (found,) = load_run(directory).predict(["After the?"], [tiny_runs.SENTENCES[0]])
    assert 0 <= found.no_answer <= 1
    assert np.isfinite(results["test"]["loss"])
    if method == "prompt-tuning":
        assert "leaves `token_type_ids` out of question answering" in (directory / "adapter/README.md").read_text()


def config_of():
    return parse_run([*tiny_runs.COMMON.split(), *tiny_runs.QUESTIONS.split()], "train.py")()


@pytest.mark.slow
def test_two_runs_in_one_program(root, run, monkeypatch):
    """The first one ends as it does alone."""
    monkeypatch.chdir(root)
    config = config_of()
    other = replace(config.training, learning_rate=1e-3)
    first, second = run_together([replace(config, name="one"), replace(config, name="other", training=other)])
    assert first.test == pytest.approx(run[1]["test"], abs=1e-4)
    assert first.calibration == pytest.approx(run[1]["calibration"], abs=1e-3)
    assert second.test["loss"] != first.test["loss"]


def test_preflight_lowers_the_programs_of_a_run(root, monkeypatch):
    monkeypatch.chdir(root)
    abstract = abstract_run(config_of(), data_parallel())
    assert abstract.lengths == (24, 32)
    for length in abstract.lengths:
        lower_training(abstract, 4, length)
        lower_evaluation(abstract, 8, length)
    data = abstract.training_data(4)
    batch = next(iter(data.eval_batches()))
    shapes = abstract.task.batch_shapes(abstract.rows, *batch["input_ids"].shape)
    assert {name: (array.shape, array.dtype) for name, array in for_device(batch).items()} == {
        name: (shape.shape, shape.dtype) for name, shape in shapes.items()
    }


REFUSED = {
    "--data.label_names [a,b]": r"data\.label_names is for classification and .*, and question-answering cannot use it",
    "--data.num_labels 3": r"data\.num_labels is for classification and multi-label, and question-answering cannot use it",
    "--data.regression true": r"data\.regression is for classification, and question-answering cannot use it",
    "--data.packing true": r"data\.packing is only for classification and .*, and the task is question-answering",
    "--training.metric accuracy": r"'accuracy' is not measured for question-answering; choose from loss, f1, exact_match, has_answer_f1",
    "--data.doc_stride -1": r"data\.doc_stride is -1; it must be at least 0, or null",
    "--data.max_answer_length 0": r"data\.max_answer_length is 0; it must be at least 1",
    "--task classification --data.doc_stride 9": r"data\.doc_stride 9 is for question-answering and .*, and the task is classification",
    "--task masked-lm --data.max_answer_length 9": r"data\.max_answer_length 9 is for question-answering, and the task is masked-lm",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_flags_that_do_not_fit(flags):
    task = "" if "--task" in flags else "--task question-answering "
    with pytest.raises(InputError, match=REFUSED[flags]):
        parse_run(["--data.train_file", "q.json", *f"{task}{flags}".split()], "train.py")()
