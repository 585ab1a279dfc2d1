"""Whole runs that train in one program leave the files that each would leave alone."""

import contextlib
import json
import os
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from jaxpeft.adapters.shira import SuperTuning
from jaxpeft.config.files import run_config
from jaxpeft.errors import InputError
from jaxpeft.report.console import TrainingBar
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.runs.sweep import run_together
from jaxpeft.runs.sweep_key import sweep_key
from jaxpeft.training.sweep import settings_of

BASE = {
    "model": {"name": "base"},
    "data": {"train_file": "train.txt", "validation_file": "validation.txt", "test_file": "test.txt", "max_length": 16},
    "adapter": {"method": "lora", "rank": 2, "alpha": 4},
    "training": {"num_steps": 6, "batch_size": 4, "warmup_steps": 1, "log_every_steps": 2, "eval_every_steps": 2},
    "evaluation": {"batch_size": 8},
}
LABELS = {"task": "classification", "data": {"train_file": "labels.tsv", "bucket_lengths": [8, 16], "max_length": 32}}

pytestmark = pytest.mark.xdist_group("runs-together")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


def config(name, *, seed=0, rate=1e-2, base=BASE, **sections):
    """A run's configuration; `sections` are laid over those of `base`."""
    values = {**base, "name": name, "seed": seed}
    values["training"] = {**values["training"], "learning_rate": rate}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return run_config(values, "test")


def together(root, configs):
    with contextlib.chdir(root):
        return run_together(configs)


def alone(root, wanted):
    """The same run by itself, under another name; its directory."""
    from jaxpeft.runs.train import run

    with contextlib.chdir(root):
        run(replace(wanted, name=f"{wanted.name}-alone"))
    return root / "runs" / f"{wanted.name}-alone"


def assert_left_the_same(root, name):
    ours, theirs = root / "runs" / name, root / "runs" / f"{name}-alone"
    a, b = (load_file(path / "adapter/adapter_model.safetensors") for path in (ours, theirs))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], atol=1e-5, rtol=1e-5, err_msg=key)
    rows, expected = (read_metrics(path / "metrics.jsonl") for path in (ours, theirs))
    assert [(row["step"], row["split"]) for row in rows] == [(row["step"], row["split"]) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert row.get("loss") == pytest.approx(other.get("loss"), rel=1e-5)
    results, others = (json.loads((path / "results.json").read_text()) for path in (ours, theirs))
    for key in ("before", "test"):
        assert results[key] == pytest.approx(others[key], rel=1e-4)
    for key in ("best_step", "steps", "parameters_trainable", "sparsity", "adapter_entries_kept", "method"):
        assert results[key] == others[key], key
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


@pytest.mark.slow
def test_masked_lm_runs_of_other_seeds_rates_ranks_and_sparsities(root, caplog):
    runs = [
        config("first"),
        config("second", seed=1, rate=3e-3, adapter={"rank": 4, "alpha": 4}),
        config("third", seed=2, pruning={"sparsity": 0.5, "begin": 0.4}),
    ]
    assert len({sweep_key(run) for run in runs}) == 1
    with jax.log_compiles():
        found = together(root, runs)
    programs = [record.getMessage() for record in caplog.records if "Compiling jit(train_steps)" in record.getMessage()]
    assert len({message.partition("Argument mapping")[0] for message in programs}) == len(programs) > 0
    assert [results.name for results in found] == ["first", "second", "third"]
    assert [results.trained_together for results in found] == [3, 3, 3]
    for run in runs:
        alone(root, run)
        assert_left_the_same(root, run.name)
    assert found[1].seconds_per_step > 0


@pytest.mark.slow
def test_classifiers_in_buckets_and_packed(root):
    base = {**BASE, **LABELS, "training": {**BASE["training"], "num_steps": 4}}
    for packing in (False, True):
        runs = [
            config(f"labels-{packing}-{seed}".lower(), seed=seed, base=base, data={"packing": packing})
            for seed in (0, 1)
        ]
        together(root, runs)
        for run in runs:
            alone(root, run)
            assert_left_the_same(root, run.name)


@pytest.mark.slow
def test_sentence_embeddings_with_cached_gradients(root):
    lines = [
        json.dumps({"anchor": a, "positive": b})
        for a, b in zip(tiny_runs.SENTENCES[:40], tiny_runs.SENTENCES[40:80], strict=True)
    ]
    (root / "together.jsonl").write_text("\n".join(lines))
    data = {"train_file": "together.jsonl", "bucket_lengths": [16], "max_length": 16}
    training = {**BASE["training"], "batch_size": 8, "micro_batch_size": 4}
    base = {**BASE, "task": "sentence-embeddings", "data": data, "training": training}
    runs = [config(f"embeddings-{seed}", seed=seed, base=base, adapter={"dropout": 0.1}) for seed in (0, 1)]
    together(root, runs)
    for run in runs:
        alone(root, run)
        assert_left_the_same(root, run.name)


@pytest.mark.slow
def test_interrupted_together_and_resumed_together(root, monkeypatch):
    runs = [config("stopped-a", rate=2e-2), config("stopped-b", seed=3)]
    advance = TrainingBar.advance

    def terminate(bar, step):
        advance(bar, step)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingBar, "advance", terminate)
    with pytest.raises(SystemExit) as stopped:
        together(root, runs)
    monkeypatch.undo()
    assert stopped.value.code == 128 + signal.SIGTERM
    together(root, [replace(run, resume=True) for run in runs])
    for run in runs:
        alone(root, run)
        assert_left_the_same(root, run.name)


@pytest.fixture(scope="module")
def one_of_two(root):
    """The answers of a run that diverges and of one that converges."""
    return together(root, [config("diverges", rate=1e30), config("converges", rate=1e-3)])


def test_one_that_fails_is_an_answer_and_the_others_finish(one_of_two, root):
    failed, fine = one_of_two
    assert isinstance(failed, InputError)
    assert "the loss is" in str(failed)
    assert fine.name == "converges"
    assert not (root / "runs/diverges/results.json").exists()


@pytest.mark.usefixtures("one_of_two")
def test_a_directory_that_holds_a_run_stops_all_before_anything_is_written(root):
    with pytest.raises(InputError, match="'runs/converges' already holds a run"):
        together(root, [config("not-begun", seed=1), config("converges", seed=2)])
    assert not (root / "runs/not-begun").exists()


def test_the_settings_of_a_method_without_a_rank():
    """Super-Tuning by sparsity: its rank is there, and is None."""
    methods = [SuperTuning(rank=None, alpha=None, sparsity=0.9)] * 2
    assert settings_of(methods, [1e-3, 1e-2])[0] == methods[0]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"weight_decay": 0.1}}, r"training\.weight_decay: 0\.01 and 0\.1"),
        ({"training": {"batch_size": 8}}, r"training\.batch_size: 4 and 8"),
        ({"training": {"max_grad_norm": 0.0}}, r"training\.max_grad_norm: 1\.0 and 0\.0"),
        ({"data": {"train_file": "test.txt"}}, r"data\.train_file: train\.txt and test\.txt"),
        ({"model": {"dropout": 0.0}}, r"model\.dropout: None and 0\.0"),
        ({"model": {"dropout": 0.0}, "training": {"batch_size": 8}}, r"model\.dropout: .*; training\.batch_size: "),
    ],
)
def test_runs_that_cannot_share_a_program_are_refused(root, sections, said):
    """They would all train with the first one's values, while each config.yaml records its own."""
    with pytest.raises(InputError, match=rf"'one' and 'two' cannot train together, because they differ in {said}"):
        together(root, [config("one"), config("two", **sections)])
    assert not (root / "runs/one").exists()


def test_runs_that_can_only_train_alone_are_refused(root):
    full = {"method": "full", "rank": None, "alpha": None}
    with pytest.raises(
        InputError, match="'two' cannot train together with other runs: full fine-tuning freezes nothing"
    ):
        together(root, [config("one"), config("two", adapter=full)])
    with pytest.raises(InputError, match="two of these runs have the same name"):
        together(root, [config("one"), config("one", seed=1)])
