"""A whole comparison of tiny runs: interrupted, resumed, with a run that fails; and its report."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import tiny_comparison
import tiny_runs
from tiny_comparison import COMPARISON, Jobs, compare

from jaxpeft.comparison import command, jobs
from jaxpeft.report.results import read_results

# One worker, in this order: the later tests add runs to the directory, which the comparison would find.
pytestmark = pytest.mark.xdist_group("compare")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.fixture(scope="module")
def compared(root):
    return tiny_comparison.compared(root)


@pytest.mark.slow
def test_runs_that_fit_together_train_together_and_none_twice(compared):
    _, first, second = compared
    trained = first.trained + second.trained
    names = [name for group in trained for name in group]
    assert len(names) == len(set(names))
    assert max(map(len, trained)) <= 3
    assert any(
        {"statements-lora-lr0.01-seed0", "statements-sparse-lora-lr0.01-seed0"} <= set(group) for group in trained
    )
    assert ["statements-full-lr0.0001-seed0"] in trained


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_the_others_finish(compared, capsys):
    directory, _, _ = compared
    runs = directory / "runs"
    assert "the loss is" in (runs / "statements-broken-lr1e+30-seed0" / "failure.txt").read_text()
    done = {path.parent.name for path in runs.glob("*/results.json")}
    assert {"statements-sparse-lora-lr0.01-seed1", "statements-full-lr0.0001-seed1"} <= done
    assert not any("broken" in name for name in done)
    assert "statements-broken-lr1e+30-seed0" in (directory / "report.md").read_text()


@pytest.mark.slow
def test_the_same_command_finds_nothing_left_to_do(compared, root):
    jobs = Jobs()
    compare(root, jobs)
    assert jobs.done == []
    compare(root, jobs, "--retry_failed", "true")
    assert jobs.trained == [["statements-broken-lr1e+30-seed0"]]


@pytest.mark.slow
def test_another_configuration_of_a_run_that_is_there_is_refused(compared, root, capsys):
    with pytest.raises(SystemExit) as refused:
        compare(root, Jobs(), "--base.training.num_steps", "6")
    assert refused.value.code == 2
    assert "was run with another configuration (training.num_steps: 4, now 6)" in capsys.readouterr().err


@pytest.mark.slow
def test_results_are_a_line_for_every_run(compared):
    directory, _, _ = compared
    with (directory / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    by_status = {status: [line for line in lines if line["status"] == status] for status in ("finished", "failed")}
    assert len(by_status["failed"]) == 1
    assert {line["method"] for line in by_status["finished"]} == {"lora", "sparse-lora", "full", "head"}
    line = next(line for line in by_status["finished"] if line["method"] == "sparse-lora")
    results = read_results(directory / "runs" / "statements-sparse-lora-lr0.01-seed0" / "results.json")
    assert float(line["validation_accuracy"]) == results.test["accuracy"]
    assert int(line["parameters_trainable"]) == results.parameters_trainable
    assert float(line["general_perplexity_before"]) > 1


@pytest.mark.slow
def test_only_what_was_trained_in_the_encoder_forgets(compared):
    directory, _, _ = compared

    def forgetting(method, rate):
        return json.loads((directory / "runs" / f"statements-{method}-lr{rate}-seed0" / "forgetting.json").read_text())

    head = forgetting("head", "0.01")
    assert head["after"] == pytest.approx(head["before"], rel=1e-6)
    for method, rate in (("sparse-lora", "0.01"), ("full", "0.0001")):
        found = forgetting(method, rate)
        assert found["before"] == pytest.approx(head["before"], rel=1e-6)
        assert abs(found["after"] - found["before"]) > 1e-6 * found["before"]


@pytest.mark.slow
def test_the_report_says_what_was_measured(compared):
    directory, _, _ = compared
    text = (directory / "report.md").read_text()
    for said in ("| LoRA |", "| Sparse LoRA |", "± ", "the baseline", "Learning rates", "**0.0", "→"):
        assert said in text, said
    for picture in ("parameters", "time", "curves", "memory"):
        assert (directory / "pictures" / f"statements-{picture}.svg").stat().st_size > 1000
        assert f"pictures/statements-{picture}.svg" in text
    for line in text.splitlines():
        if line.startswith("- ["):
            assert (directory / line.partition("(")[2].rstrip(")")).is_file()


def cell_run(method="lora", rate=0.5, **changes):
    config = command.CompareConfig(**{**COMPARISON, "forgetting": None, **changes})
    return command.Planned.of(command.run_of(config, command.Cell("statements", method, rate, 0)))


def test_a_process_that_dies_is_a_failure_of_its_run(root, monkeypatch):
    monkeypatch.setattr(jobs, "do", lambda job, **environment: "its process ended with signal SIGKILL")
    with contextlib.chdir(root):
        command._do_training([cell_run()])
        failure = root / "runs/tiny/runs/statements-lora-lr0.5-seed0/failure.txt"
        assert failure.read_text() == "its process ended with signal SIGKILL"


def test_runs_that_cannot_train_together_train_one_by_one(root, monkeypatch, capsys):
    """As where eight need more memory than there is, and one does not; or where one of them cannot be made at all."""
    monkeypatch.setattr(jobs, "do", done := Jobs())
    methods = {
        "lora": {"learning_rates": [0.25]},
        "too-many": {"learning_rates": [0.25], "adapter": {"rank": 64, "init_lora_weights": "orthogonal"}},
    }
    runs = [cell_run(method, 0.25, methods=methods) for method in methods]
    assert runs[0].key == runs[1].key
    with contextlib.chdir(root):
        command._do_training(runs)
        good, bad = (root / "runs/tiny/runs" / run.name for run in runs)
    assert [len(names) for names in done.trained] == [2, 1, 1]
    assert "these runs did not train together" in capsys.readouterr().out
    assert (good / "results.json").is_file()
    assert not (good / "failure.txt").exists()
    assert (bad / "failure.txt").is_file()


def test_a_job_is_a_process_of_its_own(root):
    """With an error that is nobody's input: what it was is kept, and the process is no worse for it."""
    job = {
        "do": "train",
        "runs": [{"name": "nobody", "data": {"name": "python-docs"}, "model": {"name": "./nowhere"}}],
        "resume": [False],
    }
    with contextlib.chdir(root):
        assert jobs.do({**job, "by_itself": True}) is None
        assert "nowhere" in (root / "runs/nobody/failure.txt").read_text()
        assert jobs.do({"do": "nothing"}) == "its process ended with status 1"


def test_a_signal_reaches_the_process_and_ends_the_comparison(root, monkeypatch):
    started = subprocess.Popen

    def popen(*args, **options):
        process = started([sys.executable, "-c", SLEEPER], **{**options, "pass_fds": ()})
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGHUP)).start()
        return process

    monkeypatch.setattr(jobs.subprocess, "Popen", popen)
    outside = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and would stay so
    try:
        with contextlib.chdir(root), pytest.raises(SystemExit) as stopped:
            jobs.do({"do": "train"})
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, outside)
    assert stopped.value.code == 128 + signal.SIGHUP
    assert (root / "saved").is_file()


SLEEPER = """
import pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
time.sleep(60)
"""


def test_one_comparison_at_a_time(root, capsys):
    directory = root / "runs/tiny"
    directory.mkdir(parents=True, exist_ok=True)
    with jobs.alone_in(directory), pytest.raises(SystemExit) as refused:
        compare(root, Jobs())
    assert refused.value.code == 2
    assert "another process is working on the comparison in 'runs/tiny'" in capsys.readouterr().err


def test_help_names_every_key(root):
    command_line = [sys.executable, "-m", "jaxpeft", "compare", "--help"]
    text = subprocess.run(command_line, capture_output=True, text=True, check=True).stdout
    for key in ("--seeds", "--together", "--tasks", "--methods", "--forgetting", "learning_rates"):
        assert key in text
