"""Whole runs with weighted classes and smoothed labels: what they write, and that they can train together."""

import contextlib
import json
from dataclasses import replace

import pytest
import tiny_runs

from jaxpeft.config.files import run_config
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.runs.sweep import run_together
from jaxpeft.runs.sweep_key import sweep_key

pytestmark = pytest.mark.xdist_group("runs")

FLAGS = """
--task classification --model.name base --data.train_file unequal.tsv --data.bucket_lengths [16] --training.batch_size 8
--training.num_steps 2 --training.eval_every_steps 2 --data.validation_file unequal.tsv
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The workplace with a file of 40 rows, of which every fourth is "rare"."""
    root = tiny_runs.workplace(tmp_path_factory)
    rows = [f"{line}\t{'often' if i % 4 else 'rare'}" for i, line in enumerate(tiny_runs.SENTENCES[:40])]
    (root / "unequal.tsv").write_text("text\tlabel\n" + "\n".join(rows))
    return root


def test_a_run_says_its_weights_and_reports_the_plain_loss(root, capsys):
    options = "--training.class_weights balanced --training.label_smoothing 0.1"
    directory, results = tiny_runs.train(root, f"--name weighted {FLAGS} {options}")
    assert "loss   label smoothing 0.1, class weights often 0.6667, rare 2" in capsys.readouterr().out
    assert results["loss_options"] == {
        "label_smoothing": 0.1,
        "class_weights": {"often": pytest.approx(2 / 3), "rare": 2.0},
    }
    card = (directory / "adapter" / "README.md").read_text()
    assert "| training loss | label smoothing 0.1, class weights often 0.6667, rare 2 |" in card
    plain = tiny_runs.train(root, f"--name unweighted {FLAGS}")[1]
    assert plain["loss_options"] == {}
    assert results["before"] == pytest.approx(plain["before"], rel=1e-5)  # the same figures of the same start
    first, other = (
        next(row["loss"] for row in read_metrics(root / "runs" / name / "metrics.jsonl") if row["split"] == "train")
        for name in ("weighted", "unweighted")
    )
    assert first != pytest.approx(other, rel=1e-3)  # but training minimises another one


@pytest.mark.slow
def test_such_runs_train_together(root):
    values = {
        "task": "classification",
        "model": {"name": "base"},
        "data": {"train_file": "unequal.tsv", "bucket_lengths": [16], "max_length": 16},
        "adapter": {"method": "lora", "rank": 2},
        "training": {"num_steps": 2, "batch_size": 8, "class_weights": {"rare": 5}, "label_smoothing": 0.1},
        "evaluation": {"before": False},
    }
    runs = [run_config({**values, "name": f"heavy-{seed}", "seed": seed}, "test") for seed in (0, 1)]
    other = run_config({**values, "training": {**values["training"], "class_weights": {"rare": 4}}}, "test")
    assert sweep_key(runs[0]) == sweep_key(runs[1]) != sweep_key(other)
    with contextlib.chdir(root):
        from jaxpeft.runs.train import run

        together = run_together(runs)
        alone = run(replace(runs[1], name="heavy-alone"))
    assert together[1].test == pytest.approx(alone.test, rel=1e-4)
    assert together[1].loss_options == alone.loss_options
    assert json.loads((root / "runs/heavy-1/results.json").read_text())["loss_options"]["class_weights"]["rare"] == 5
