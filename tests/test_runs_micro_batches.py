"""Whole runs in micro-batches: the results of a run do not depend on them, and a resumed run keeps its own."""

import contextlib
import json
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from jaxpeft.adapters import Site
from jaxpeft.config import TrainingConfig
from jaxpeft.config.files import run_config
from jaxpeft.report.console import TrainingBar
from jaxpeft.runs import micro_batches
from jaxpeft.runs.sweep import run_together
from jaxpeft.training.checkpoint import Progress

FLAGS = """
--model.name base --data.train_file train.txt --data.validation_file validation.txt --data.test_file test.txt
--training.batch_size 16 --adapter.dropout 0.1
"""
CONFIG = {
    "model": {"name": "base"},
    "data": {"train_file": "train.txt", "validation_file": "validation.txt", "max_length": 16},
    "adapter": {"rank": 2},
    "training": {"num_steps": 2, "batch_size": 16, "warmup_steps": 1},
}

pytestmark = pytest.mark.xdist_group("runs-micro-batches")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


def tensors(directory):
    return load_file(directory / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def in_one_pass(root):
    return tiny_runs.train(root, FLAGS, "--name", "in-one-pass")


def test_auto_is_one_pass_if_the_program_is_small(in_one_pass):
    assert in_one_pass[1]["micro_batch_tokens"] is None


def test_the_adapter_does_not_depend_on_the_micro_batch(root, in_one_pass, capsys):
    directory, results = tiny_runs.train(root, FLAGS, "--name", "in-passes", "--training.micro_batch_size", "4")
    assert "micro-batches: 4 passes of 4 rows for a batch of 16 rows of 16 tokens" in capsys.readouterr().out
    assert results["micro_batch_tokens"] == 64
    whole, divided = tensors(in_one_pass[0]), tensors(directory)
    for name, tensor in whole.items():
        np.testing.assert_allclose(divided[name], tensor, atol=1e-6, err_msg=name)


def test_auto_goes_by_the_program_s_memory_and_a_resumed_run_keeps_it(root, in_one_pass, monkeypatch):
    """Nothing fits, so a pass has one row. When the run is resumed, the whole batch would fit."""
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(micro_batches, "CPU_TEMPORARY_BYTES", 0)  # nothing fits: a row a pass and device
        whole, expected = tiny_runs.train(root, FLAGS, "--name", "a-row-a-pass")
        patch.setattr(TrainingBar, "advance", terminate)
        with pytest.raises(SystemExit):
            tiny_runs.train(root, FLAGS, "--name", "stopped-in-passes")
    resumed, results = tiny_runs.train(root, FLAGS, "--name", "stopped-in-passes", "--resume")
    assert (
        expected["micro_batch_tokens"] == results["micro_batch_tokens"] == 64
    )  # four devices, a row of 16 tokens each
    file = "adapter/adapter_model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()
    for name, tensor in tensors(in_one_pass[0]).items():
        np.testing.assert_allclose(tensors(whole)[name], tensor, atol=1e-6, err_msg=name)


def decided(platform, memory_bytes, *, free=None, size="auto", trained=None):
    """The passes of a batch of 32 rows, if one pass of n rows has `memory_bytes(n)` of temporary memory."""
    tried = []

    def compiled(chosen):
        tried.append(rows := chosen.rows_of(32, 128).in_pass)
        sizes = SimpleNamespace(temp_size_in_bytes=memory_bytes(rows), output_size_in_bytes=70, alias_size_in_bytes=60)
        return SimpleNamespace(memory_analysis=lambda: sizes)

    device = SimpleNamespace(platform=platform, memory_stats=lambda: free)
    parallel = SimpleNamespace(
        device=device, mesh=SimpleNamespace(size=1, local_devices=[device]), largest=lambda passes: passes
    )
    sites = {"bert/dense": Site("bert/dense", 4, 100), "cls/dense": Site("cls/dense", 4, 10_000)}
    chosen, progress = micro_batches.decide(
        TrainingConfig(micro_batch_size=size),
        parallel,
        Progress(),
        SimpleNamespace(batch_shapes={(32, 128), (32, 16)}),
        compiled,
        model=SimpleNamespace(base_prefix="bert", sites=lambda: sites),
        trained=np.zeros(trained or 0, np.float32),
    )
    assert chosen.rows_of(32, 128).in_pass * 128 == (progress.micro_batch_tokens or 32 * 128)
    return 32 // chosen.rows_of(32, 128).in_pass, tried


def test_a_cpu_takes_the_most_rows_whose_temporaries_stay_below_its_limit(monkeypatch):
    monkeypatch.setattr(micro_batches, "CPU_TEMPORARY_BYTES", 3_000_000)
    # 14 · 100 bytes a token are expected, so two passes are tried first.
    assert decided("cpu", lambda rows: 100_000 * rows) == (2, [16])
    assert decided("cpu", lambda rows: 50_000 * rows) == (1, [16, 32])
    assert decided("cpu", lambda rows: 300_000 * rows) == (4, [16, 8])
    # Full fine-tuning: the gradients and their sum are as large in every pass, and do not count.
    assert decided("cpu", lambda rows: 8_000_000 + 100_000 * rows, trained=1_000_000) == (2, [16])


def test_an_accelerator_takes_the_most_rows_that_fit():
    free = {"bytes_limit": 2010, "bytes_in_use": 1000}
    assert decided("gpu", lambda rows: 25 * rows, free=free) == (1, [32])
    assert decided("gpu", lambda rows: 28 * rows, free=free) == (1, [32])  # 0.9 · 1010 ≥ 896 + 10
    assert decided("gpu", lambda rows: 29 * rows, free=free) == (2, [32, 16])
    assert decided("tpu", lambda rows: 10**9) == (1, [])  # the device does not say how much it has
    assert decided("gpu", lambda rows: 10**9, size=8) == (4, [])

    def no_room(rows):
        if rows > 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 100

    assert decided("gpu", no_room, free=free) == (8, [32, 16, 8, 4])


def test_runs_in_one_program(root):
    found = {}
    for size in ("auto", 4):
        names = [f"{size}-{seed}" for seed in (0, 1)]
        configs = [
            run_config(
                {**CONFIG, "name": name, "seed": seed, "training": {**CONFIG["training"], "micro_batch_size": size}},
                "test",
            )
            for seed, name in enumerate(names)
        ]
        with contextlib.chdir(root):
            run_together(configs)
        found[size] = [tensors(root / "runs" / name) for name in names]
    assert json.loads((root / "runs/4-1/results.json").read_text())["micro_batch_tokens"] == 64
    for whole, divided in zip(found["auto"], found[4], strict=True):
        for name, tensor in whole.items():
            np.testing.assert_allclose(divided[name], tensor, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("0", "training.micro_batch_size is 0; it must be at least 1, or auto"),
        ("6", "training.micro_batch_size 6 cannot be split over 4 devices; 4 can"),
        ("most", "micro_batch_size"),
    ],
)
def test_a_size_that_cannot_be(root, capsys, size, message):
    with pytest.raises(SystemExit) as ended:
        tiny_runs.train(root, FLAGS, "--name", "refused", "--training.micro_batch_size", size)
    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1) or size == "most"
    assert message in said
    assert not (root / "runs/refused").exists()
