"""Runs that leave channels out: through the command line, resumed, together, and with a proposal of `sparsity-plan`."""

import json
import os
import signal

import numpy as np
import pytest
import tiny_runs
import yaml
from safetensors.numpy import load_file

from jaxpeft.cli import train as train_command
from jaxpeft.config import AdapterConfig, ContextualConfig, DataConfig, RunConfig
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.runs.contextual import contextual_sparsity

pytestmark = pytest.mark.xdist_group("contextual-runs")

DATA = DataConfig(name="python-docs")
FLAGS = """
--model.name base --data.train_file train.txt --data.validation_file validation.txt --data.test_file test.txt --evaluation.before false
--contextual.ffn_sparsity 0.75 --contextual.qkv_sparsity [0.5] --contextual.dense_share 0.4
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.fixture(scope="module")
def run(root):
    return tiny_runs.train(root, f"--name contextual {FLAGS}")


def losses(directory):
    return {row["step"]: row["loss"] for row in read_metrics(directory / "metrics.jsonl") if row["split"] == "train"}


def test_a_run_says_what_it_left_out_and_how_well_it_chose(run):
    directory, results = run
    assert results["channel_overlap"].keys() == {"0"}
    assert results["channel_overlap"]["0"].keys() == {"query_key", "value", "feed_forward"}
    assert all(0 <= share <= 1 for share in results["channel_overlap"]["0"].values())
    card = (directory / "adapter/README.md").read_text()
    assert "LoRA with contextual sparsity" in card
    assert "SparseLoRA: Khaki et al. 2025, arXiv 2506.16500" in card
    assert "| 0 | " in card
    held = load_file(directory / "estimators.safetensors")
    assert {name.rpartition("/")[2] for name in held} == {"u", "v", "rest"}
    # The estimators served training. They are no parameters of the model.
    assert results["parameters_total"] == json.loads((directory / "results.json").read_text())["parameters_total"]
    assert "lora_A" in next(iter(load_file(directory / "adapter/adapter_model.safetensors")))


def test_the_first_steps_are_dense(root, run):
    """0.4 · 6 steps = 3 steps, whose losses are those of a dense run; then they differ."""
    dense, _ = tiny_runs.train(root, f"--name dense {FLAGS} --contextual.ffn_sparsity 0 --contextual.qkv_sparsity 0")
    sparse, plain = losses(run[0]), losses(dense)
    assert [sparse[step] for step in (1, 2, 3)] == [plain[step] for step in (1, 2, 3)]
    assert all(sparse[step] != plain[step] for step in (4, 5, 6))
    assert not (dense / "estimators.safetensors").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(root, run, monkeypatch):
    """Stopped within the dense steps, and again within the sparse ones."""
    flags = f"--name stopped {FLAGS}"
    for last, more in ((2, []), (4, ["--resume"])):
        advance = TrainingBar.advance

        def terminate(bar, step, advance=advance, last=last):
            advance(bar, step)
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(TrainingBar, "advance", terminate)
        with pytest.raises(SystemExit):
            tiny_runs.train(root, flags, *more)
        monkeypatch.undo()
    directory, _ = tiny_runs.train(root, flags, "--resume")
    for file in ("adapter/adapter_model.safetensors", "estimators.safetensors"):
        assert (directory / file).read_bytes() == (run[0] / file).read_bytes()
    assert losses(directory) == losses(run[0])


def test_damaged_estimators_are_refused(root, run, capsys):
    directory, _ = run
    file = directory / "estimators.safetensors"
    kept = file.read_bytes()
    (directory / "results.json").rename(directory / "results.kept")
    try:
        file.write_bytes(kept[:50])
        with pytest.raises(SystemExit):
            tiny_runs.train(root, f"--name contextual {FLAGS} --resume")
        assert "estimators.safetensors cannot be read" in capsys.readouterr().err
    finally:
        file.write_bytes(kept)
        (directory / "results.kept").rename(directory / "results.json")


@pytest.mark.slow
def test_runs_that_train_together_choose_for_themselves(root, monkeypatch):
    from test_runs_together import alone, assert_left_the_same, config, together

    section = {"ffn_sparsity": 0.5, "qkv_sparsity": 0.25, "dense_share": 0.2}
    runs = [config("contextual-a", contextual=section), config("contextual-b", seed=1, contextual=section)]
    together(root, runs)
    for one in runs:
        alone(root, one)
        assert_left_the_same(root, one.name)


def test_sparsity_plan_writes_a_configuration_that_train_reads(root, capsys):
    args = ["sparsity-plan", "base", "train.txt", "--batches", "1", "--batch_size", "4", "--max_length", "16"]
    tiny_runs.jaxpeft(root, *args, "--output", "plan.yaml")
    said = capsys.readouterr().out
    assert "found on average" in said
    plan = yaml.safe_load((root / "plan.yaml").read_text())["contextual"]
    assert plan.keys() == {"ffn_sparsity", "qkv_sparsity"}
    d, ffn = 16, 24
    left = 4 * d * d * (1 - plan["qkv_sparsity"][0]) + 2 * d * ffn * (1 - plan["ffn_sparsity"][0])
    assert left <= 0.5 * (4 * d * d + 2 * d * ffn)
    config = train_command_config(root, ["--config", "plan.yaml", "--model.name", "base", "--data.name", "python-docs"])
    assert config.contextual.ffn_sparsity == plan["ffn_sparsity"]
    with pytest.raises(SystemExit):
        tiny_runs.jaxpeft(root, *args, "--output", "plan.yaml")
    assert "'plan.yaml' exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tiny_runs.jaxpeft(root, *args, "--output", "other.yaml", "--operations", "0.01")
    assert "a share of 0.01 of the operations cannot be reached" in capsys.readouterr().err


def train_command_config(root, args):
    """The configuration that `train.py` makes of its arguments."""
    import contextlib
    from unittest import mock

    with contextlib.chdir(root), mock.patch("jaxpeft.runs.train.run") as performed:
        train_command.main(args, prog="train.py")
    return performed.call_args.args[0]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"ffn_sparsity": 1.0}, r"contextual\.ffn_sparsity is 1\.0; it must be at least 0 and below 1"),
        ({"qkv_sparsity": [0.5, -0.1]}, r"contextual\.qkv_sparsity is \[0\.5, -0\.1\]"),
        ({"estimator_rank": 0}, r"contextual\.estimator_rank is 0"),
        ({"dense_share": 1.0}, r"contextual\.dense_share is 1\.0"),
        ({"selection": "best"}, r"contextual\.selection is 'best'"),
    ],
)
def test_values_out_of_range_are_refused(section, message):
    with pytest.raises(InputError, match=message):
        RunConfig(contextual=ContextualConfig(**section))


def test_what_cannot_be_combined_is_refused(tiny_models):
    with pytest.raises(InputError, match=r"adapter\.method 'full' trains the base"):
        RunConfig(data=DATA, adapter=AdapterConfig(method="full"), contextual=ContextualConfig(ffn_sparsity=0.5))
    model = tiny_models("bert")
    with pytest.raises(InputError, match=r"contextual\.qkv_sparsity has 3 values, and the model has 2 layers"):
        contextual_sparsity(ContextualConfig(qkv_sparsity=[0.5, 0.5, 0.5]), model)
    assert contextual_sparsity(ContextualConfig(ffn_sparsity=[0.0, 0.0]), model) is None
    found = contextual_sparsity(ContextualConfig(ffn_sparsity=[0, 0.5]), model)
    np.testing.assert_array_equal(found.feed_forward, [0, 0.5])
    assert RunConfig(data=DATA, contextual=ContextualConfig(ffn_sparsity=0.5)).run_name.endswith("-contextual-lora")
