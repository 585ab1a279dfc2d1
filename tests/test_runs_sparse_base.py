"""Runs on a pruned base: merged with its zeros, at a cost that is told, or trained so that it costs nothing."""

import re
import shutil

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file, save_file
from tiers import slow

from jaxpeft import load_model, load_run

pytestmark = pytest.mark.xdist_group("runs")
FLAGS = "--data.train_file train.txt --data.validation_file validation.txt --model.name pruned-base"


def is_linear(key):
    return key.startswith("encoder") and key.endswith("weight") and "LayerNorm" not in key


def half(weight):
    """2:4 along the inputs, the last axis in torch."""
    groups = weight.reshape(-1, 4)
    return np.where(np.argsort(np.argsort(np.abs(groups), axis=1), axis=1) < 2, 0, groups).reshape(weight.shape)


@pytest.fixture(scope="module", name="root")
def _root(tmp_path_factory):
    """The workplace, with a base that is pruned to 2:4."""
    root = tiny_runs.workplace(tmp_path_factory)
    if not (root / "pruned-base").exists():
        shutil.copytree(root / "base", root / "pruned-base")
        file = root / "pruned-base" / "model.safetensors"
        save_file({key: half(w) if is_linear(key) else w for key, w in load_file(file).items()}, file)
    return root


def zeros_in_file(directory):
    tensors = load_file(directory / "model.safetensors")
    return {
        key.removeprefix("bert."): tensor == 0
        for key, tensor in tensors.items()
        if is_linear(key.removeprefix("bert."))
    }


def assert_same_zeros(root, merged):
    base, found = zeros_in_file(root / "pruned-base"), zeros_in_file(root / merged)
    assert found.keys() == base.keys()
    for key in base:
        np.testing.assert_array_equal(found[key], base[key])


@pytest.fixture(scope="module", name="on_pruned")
def _on_pruned(root):
    return tiny_runs.train(root, f"--name on-pruned {FLAGS}")[0]


@slow
def test_a_merge_says_what_the_zeros_cost(on_pruned, root, capsys):
    capsys.readouterr()
    directory = on_pruned
    tiny_runs.jaxpeft(root, "merge", str(directory), "merged-with-zeros", "--keep_sparsity", "true")
    out = capsys.readouterr().out
    shares = dict(re.findall(r"^(\S+/(?:query|value)) +50\.0 % \(2:4\)  (0\.\d{3})$", out, re.MULTILINE))
    assert len(shares) == 2
    assert all(0.5 < float(share) < 0.9 for share in shares.values())
    assert re.search(r"^all layers +0\.[5-8]\d\d$", out, re.MULTILINE)
    assert re.search(r"^  loss +\d+\.\d{4} → \d+\.\d{4}$", out, re.MULTILINE)
    assert_same_zeros(root, "merged-with-zeros")
    tiny_runs.jaxpeft(root, "merge", str(directory), "merged-dense")
    assert not zeros_in_file(root / "merged-dense")["encoder.layer.0.attention.self.query.weight"].any()


@slow
def test_data_that_is_gone_is_told(on_pruned, root, capsys):
    directory = on_pruned
    config = (directory / "config.yaml").read_text()
    (directory / "config.yaml").write_text(config.replace("validation.txt", "gone.txt"))
    try:
        tiny_runs.jaxpeft(root, "merge", str(directory), "merged-without-data", "--keep_sparsity", "true")
    finally:
        (directory / "config.yaml").write_text(config)
    assert re.search(
        r"the metrics were not measured, because the run's data cannot be read: .*gone\.txt", capsys.readouterr().out
    )


def test_hira_on_a_4_bit_base_keeps_what_was_rounded_to_zero(root, capsys):
    """HiRA multiplies the base, so that nothing is dropped."""
    directory, _ = tiny_runs.everything(root)
    tiny_runs.jaxpeft(root, "merge", str(directory), "merged-hira", "--keep_sparsity", "true")
    out = capsys.readouterr().out
    assert re.search(r"^all layers +0\.000$", out, re.MULTILINE)
    assert "the base is quantised: weights that were rounded to zero count as its zeros, and stay zero" in out
    ((before, after),) = re.findall(r"^  loss +(\d+\.\d{4}) → (\d+\.\d{4})$", out, re.MULTILINE)
    assert float(before) == pytest.approx(float(after), abs=1.1e-4)


@slow
def test_a_run_that_leaves_the_zeros_loses_nothing(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    directory, results = tiny_runs.train(
        root, f"--name zeros-kept {FLAGS} --adapter.keep_base_zeros true --training.accumulation_steps 2"
    )
    assert "50.0 % of the adapted weights are zero" in capsys.readouterr().out
    tiny_runs.jaxpeft(root, "merge", str(directory), "merged-for-free")
    assert_same_zeros(root, "merged-for-free")
    run, merged = load_run(directory), load_model(str(root / "merged-for-free"), "masked-lm")
    ids = np.arange(24, dtype=np.int32).reshape(2, 12) + 5
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    trained = run.objective.logits(run.frozen, run.adapters, {}, batch)
    plain = jax.device_get(merged.module.apply({"params": merged.params}, **merged.inputs(batch)).logits)
    np.testing.assert_allclose(plain, trained, rtol=0, atol=1e-6 * float(np.abs(trained).max()))
    tiny_runs.jaxpeft(root, "merge", str(directory), "merged-again-for-free", "--keep_sparsity", "true")
    assert re.search(r"^all layers +0\.000$", capsys.readouterr().out, re.MULTILINE)
    card = (root / results["export"] / "README.md").read_text()
    assert "PEFT does not have the option keep_base_zeros and cannot load the files" in card
    assert "library_name: jaxpeft" in card
    assert "LoSA: Huang et al. 2025" in card


def test_a_base_without_zeros_is_refused(root, capsys):
    with pytest.raises(SystemExit):
        tiny_runs.train(root, f"--name x {FLAGS.replace('pruned-base', 'base')} --adapter.keep_base_zeros true")
    assert (
        "adapter.keep_base_zeros keeps the zeros of a pruned base, and no adapted layer of this base has any"
        in capsys.readouterr().err
    )
    assert not (root / "runs" / "x").exists()
