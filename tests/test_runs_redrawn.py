"""Whole runs of sparse updates whose entries are redrawn, through the command line."""

import json
import os
import shlex
import signal

import numpy as np
import pytest
import tiny_runs
import torch_side
from tiers import slow_but

from jaxpeft.report.console import TrainingBar
from jaxpeft.report.sparsity import read_records

FLAGS = """
--model.name base --data.train_file train.txt --data.validation_file validation.txt --data.test_file test.txt
--pruning.every_steps 2 --pruning.end 1 --pruning.drop_fraction 0.5
"""
RUNS = {
    "rigl": "--adapter.method shira --pruning.schedule rigl --model.quantization nf4 --training.accumulation_steps 2",
    "set": "--adapter.method supertuning --adapter.sparsity 0.9 --adapter.alpha 3 --adapter.dropout 0.1 --pruning.schedule set",
    "classes": "--adapter.method shira --pruning.schedule rigl --task classification --data.bucket_lengths [8,16]",
}

pytestmark = pytest.mark.xdist_group("runs-methods")


def indices(directory):
    return {key: value for key, value in torch_side.tensors_of(directory / "adapter").items() if "indices" in key}


@pytest.mark.parametrize("name", slow_but(RUNS, "set"))
def test_a_run_redraws_its_entries_and_goes_on_after_a_stop(name, tmp_path_factory, monkeypatch, capsys):
    root = tiny_runs.workplace(tmp_path_factory)
    flags = shlex.split(FLAGS + RUNS[name])
    if name == "classes":
        flags = shlex.split(
            f"{RUNS[name]} --model.name base --data.train_file labels.tsv --pruning.every_steps 2 --pruning.end 1"
        )
    directory, results = tiny_runs.train(root, "", *flags, "--name", f"redrawn-{name}")
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([row["loss"] for row in log if row["split"] == "train"]).all()
    changes = {row["step"]: row["mask_churn"] for row in log if row["split"] == "pruning"}
    assert list(changes) == [2, 4]
    assert changes[2] > changes[4] > 0
    records = read_records(directory / "sparsity.jsonl")
    assert {record["step"]: record["churn"] for record in records} == changes
    assert results["sparsity"] == 0
    card = (directory / "adapter" / "README.md").read_text()
    assert f"redrawn by {'SET' if name == 'set' else 'RigL'}" in card
    assert f"| entries redrawn | {'set' if name == 'set' else 'rigl'}, every 2 steps" in card
    # The exported file gives the run's own figures.
    monkeypatch.chdir(root)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", f"runs/redrawn-{name}")
    assert f" {results['test']['loss']:.4f}" in capsys.readouterr().out

    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    again = ("--config", f"runs/redrawn-{name}/config.yaml", "--name", f"redrawn-{name}-stopped")
    with monkeypatch.context() as patched:
        patched.setattr(TrainingBar, "advance", terminate)
        with pytest.raises(SystemExit):
            tiny_runs.train(root, "", *again)
    resumed, after = tiny_runs.train(root, "--resume", *again)
    assert after["test"] == results["test"]
    file = "adapter/adapter_model.safetensors"
    assert (resumed / file).read_bytes() == (directory / file).read_bytes()
    assert read_records(resumed / "sparsity.jsonl") == records
    for found in indices(directory).values():
        number = found.shape[-1]
        assert np.unique(found.reshape(-1, number), axis=1).shape[1] == number
