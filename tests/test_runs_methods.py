"""A whole run of every method and start, from flags to the exported adapter, which must say what the run measured."""

import json
import shlex

import numpy as np
import pytest
import tiny_runs
import torch_side

from jaxpeft import load_run
from jaxpeft.runs import setup
from jaxpeft.runs.adapters import build_method

CLASSES = """
--task classification --model.name base --data.train_file labels.tsv --data.bucket_lengths [16]
--training.num_steps 6 --training.eval_every_steps 6
"""
WORDS = "--model.name base --data.train_file train.txt --data.validation_file validation.txt --data.test_file test.txt"
RUNS = {
    "dora": f"{CLASSES} --adapter.use_dora true --adapter.use_rslora true --adapter.bias all --adapter.rank_pattern '{{value: 1}}'",
    "lora-plus": f"{CLASSES} --training.loraplus_lr_ratio 4 --adapter.target_modules '[word_embeddings, query]'",
    "pissa": f"{CLASSES} --adapter.init_lora_weights pissa --adapter.layers_to_transform 0 --adapter.target_modules '[query]'",
    "olora": f"{CLASSES} --model.quantization nf4 --adapter.init_lora_weights olora --adapter.alpha 2",
    "loftq": f"{WORDS} --adapter.init_lora_weights loftq --adapter.loftq_config '{{loftq_bits: 4, loftq_iter: 2}}'",
    "eva": f"{WORDS} --adapter.init_lora_weights eva --adapter.calibration_batches 2",
    "lora-ga": f"{CLASSES} --adapter.init_lora_weights lora_ga --adapter.calibration_batches 2",
    "ia3": CLASSES,
    "vera": WORDS,
    "loha": f"{CLASSES} --model.quantization fp4 --adapter.rank_dropout 0.1",
    "lokr": f"{WORDS} --model.quantization int8 --pruning.sparsity 0.5",
    "adalora": f"{WORDS} --adapter.init_r 4 --adapter.target_r 2 --adapter.tinit 1 --adapter.tfinal 2",
    "shira": f"{CLASSES} --adapter.mask_type gradient --adapter.calibration_batches 2 --adapter.rank 1",
    "supertuning": f"{WORDS} --model.quantization nf4 --adapter.sparsity 0.9 --adapter.rank null --adapter.alpha null",
    "s2ft": f"{CLASSES} --adapter.channels 3 --adapter.selection activation --adapter.calibration_batches 2 --pruning.sparsity 0.5",
    "sora": f"{WORDS} --adapter.sparse_lambda 0.3",
    "ln-tuning": CLASSES,
    "bitfit": WORDS,
    "prompt-tuning": f"{WORDS} --adapter.num_virtual_tokens 3 --adapter.prompt_tuning_init TEXT"
    " --adapter.prompt_tuning_init_text 'the class'",
}
LORA = ("dora", "lora-plus", "pissa", "olora", "loftq", "eva", "lora-ga")

pytestmark = pytest.mark.xdist_group("runs-methods")


@pytest.fixture(name="root")
def _root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_its_adapter_is_what_was_measured(name, root, monkeypatch, capsys):
    method = "lora" if name in LORA else name
    built = []
    monkeypatch.setattr(setup, "build_method", lambda adapter: built.append(adapter) or build_method(adapter))
    flags = [*shlex.split(RUNS[name]), "--name", f"method-{name}", "--adapter.method", method]
    directory, results = tiny_runs.train(root, "", *flags)
    assert len(built) == 1
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if row["split"] == "train"]
    assert np.isfinite(losses).all()
    assert results["parameters_trainable"] < results["parameters_total"]
    card = (directory / "adapter" / "README.md").read_text()
    assert "| method |" in card
    assert ("cannot load these files" in card) == (name == "prompt-tuning")  # PEFT's, for masked-lm
    assert ("LoftQ at every load" in card) == (name == "loftq")
    # The exported file gives the run's own figures: what was trained is what was written.
    monkeypatch.chdir(root)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", f"runs/method-{name}")
    assert f" {results['test']['loss']:.4f}" in capsys.readouterr().out
    finished = load_run(f"runs/method-{name}")
    assert finished.predict(["The [MASK] statement."])
    config = torch_side.config_of(directory / "adapter")
    own = {"bitfit": "LORA", "s2ft": "SHIRA", "sora": "LORA"}
    assert config["peft_type"] == own.get(method, method.upper().replace("-", "_"))
    if name in ("pissa", "lora-ga"):
        assert config["init_lora_weights"] is True  # exported as the difference, for the base as it was
        assert config["r"] == 4
    if name == "olora":  # on a quantised base: what was left of it was rounded again, and is left so at every load
        assert config["init_lora_weights"] == "olora"
    if name == "adalora":
        assert sum(map(sum, config["rank_pattern"].values())) == 4  # two layers, two ranks each


PRUNED = {
    "rigl": "--pruning.schedule rigl --pruning.every_steps 2 --pruning.end 0.9 --pruning.scope global --pruning.criterion product",
    "ranks": "--pruning.schedule straight-through --pruning.every_steps 1 --pruning.structure rank --pruning.criterion movement",
    "start": "--pruning.schedule at-start --pruning.criterion random --model.quantization nf4",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_run_logs_what_it_keeps_and_exports_it(name, root, monkeypatch, capsys):
    flags = [*shlex.split(f"{WORDS} --pruning.sparsity 0.5 {PRUNED[name]}"), "--name", f"pruned-{name}"]
    directory, results = tiny_runs.train(root, "", *flags)
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    changes = {row["step"]: row for row in log if row["split"] == "pruning"}
    rows = [json.loads(line) for line in (directory / "sparsity.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == changes.keys()
    for step, change in changes.items():
        kept, size = (sum(sum(row[key].values()) for row in rows if row["step"] == step) for key in ("kept", "size"))
        assert change["sparsity"] == pytest.approx(1 - kept / size)
    assert results["sparsity"] == changes[max(changes)]["sparsity"]
    assert results["sparsity"] == pytest.approx(0.5 if name != "start" else 0.25, abs=0.01)
    monkeypatch.chdir(root)
    capsys.readouterr()
    tiny_runs.jaxpeft(root, "evaluate", f"runs/pruned-{name}")
    assert f" {results['test']['loss']:.4f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_logs_the_share_of_pruned_triplets(root):
    flags = shlex.split(RUNS["adalora"])
    directory, _ = tiny_runs.train(root, "", *flags, "--name", "adalora-whole", "--adapter.method", "adalora")
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert any(row.get("sparsity") for row in log)
