"""`python -m jaxpeft quantize`: what it prints and writes, that a run on it is the run on a base quantised while loading, errors."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import tiny
import tiny_runs
import torch_side

from jaxpeft import cli, load_model
from jaxpeft.cli import train as train_command
from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, RunConfig
from jaxpeft.quantization import is_quantized
from jaxpeft.runs.base_model import load_base
from jaxpeft.tasks import task_for
from jaxpeft.trees import leaf_paths, size_bytes

WIDTH = {**tiny_runs.TINY, "hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with `base`, a bare encoder with a tokenizer, and a text to train on."""
    root = tmp_path_factory.mktemp("quantize")
    tiny.random_encoder(root / "base", num_hidden_layers=1, **WIDTH)
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tiny_runs.package_model() / name, root / "base" / name)
    (root / "train.txt").write_text("\n".join(tiny_runs.SENTENCES[:60]))
    return root


@pytest.fixture(autouse=True)
def inside(place):
    with contextlib.chdir(place):
        yield


def quantize(*args):
    cli.main(["quantize", *args])


def refused(capsys, *args):
    with pytest.raises(SystemExit) as stopped:
        quantize(*args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def config(name, task, **model):
    data = {"masked-lm": {"train_file": "train.txt"}, "classification": {"name": "glue/sst2"}}[task]
    return RunConfig(
        task=task,
        model=ModelConfig(name=name, **model),
        data=DataConfig(max_length=16, **data),
        adapter=AdapterConfig(rank=2),
    )


FLAGS = {
    "nf4": ((), {}),
    "fp4": (
        ("--block_size", "128", "--double_quantization", "false"),
        {"quantization_block_size": 128, "double_quantization": False},
    ),
    "int8": ((), {}),
}


def prepared(run, num_labels):
    task = task_for(run.task, num_labels)
    model, _ = load_base(run.model, task, None, run.adapter, max_length=run.data.max_length, seed=run.seed)
    return tiny.prepared(run, model)


@pytest.mark.parametrize("data_type", FLAGS)
def test_a_run_on_it_has_the_base_that_the_flag_makes(data_type, capsys):
    """Bit for bit: the quantised kernels, and all else, the heads that are drawn and the adapters too."""
    flags, options = FLAGS[data_type]
    quantize("base", f"{data_type}-base", "--data_type", data_type, *flags)
    printed = capsys.readouterr().out
    for task, num_labels, num_kernels in (("masked-lm", None, 6), ("classification", 2, 7)):
        runs = [config("base", task, quantization=data_type, **options), config(f"{data_type}-base", task)]
        expected, found = (prepared(run, num_labels) for run in runs)
        chex.assert_trees_all_equal(found.frozen, expected.frozen)
        assert jax.tree.structure(found.frozen) == jax.tree.structure(expected.frozen)
        chex.assert_trees_all_equal(found.adapters, expected.adapters)
        held = [leaf for leaf in leaf_paths(found.frozen).values() if is_quantized(leaf)]
        assert len(held) == num_kernels
    bits = 8 * size_bytes(held) / sum(leaf.size for leaf in held)
    assert f"7 linear layers in {data_type}" in printed
    assert f"{bits:.3f} bits a weight" in printed


def test_it_prints_sizes_and_writes_what_a_model_needs(capsys):
    quantize("base", "sizes")
    with contextlib.chdir("sizes"):
        weights = (Path.cwd() / "model.safetensors").stat().st_size
        names = {path.name for path in Path.cwd().iterdir()}
    tokenizer = {"vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert names == {"model.safetensors", "config.json", *tokenizer}
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"7 linear layers in nf4 in blocks of 64 with double quantisation: 0\.0 MB in float32 → 0\.0 MB, 4\.\d+ bits a weight",
        first,
    )
    full = sum(array.nbytes for array in torch_side.tensors_of(Path("base"), "model.safetensors").values())
    assert second == f"whole model in sizes: {full / 1e6:.1f} MB in float32 → {weights / 1e6:.1f} MB on disk"
    assert third.startswith("--model.name sizes trains on it; from_pretrained('sizes')")
    assert torch_side.config_of(Path("sizes"), "config.json")["architectures"] == ["BertModel"]


@pytest.mark.slow
def test_a_training_run_on_it(capsys):
    """The two runs print and measure the same: the base is the same, and so is every draw."""
    quantize("base", "trained-base", "--task", "masked-lm")
    results = []
    for name, flags in (("flag", "--model.name base --model.quantization nf4"), ("file", "--model.name trained-base")):
        train = f"--name {name} {flags} --data.train_file train.txt --training.num_steps 2"
        results.append(tiny_runs.train(Path.cwd(), train)[1])
    for key in ("test", "before", "frozen_bytes", "parameters_total", "parameters_trainable"):
        assert results[0][key] == results[1][key], key


def test_for_one_task_no_more_is_written_than_it_needs():
    quantize("base", "masked-lm-base", "--task", "masked-lm")
    names = torch_side.tensors_of(Path("masked-lm-base"), "model.safetensors")
    assert not [name for name in names if "pooler" in name]
    model = load_model("masked-lm-base", "masked-lm")
    assert np.isfinite(size_bytes(model.params))


def test_what_is_refused(capsys):
    quantize("base", "full")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("full").iterdir()}
    said = refused(capsys, "base", "full")
    assert "'full' exists and is not empty; give a new directory" in said
    assert "'train.txt' exists and is not empty" in refused(capsys, "base", "train.txt")
    assert "is quantised already, to nf4 in blocks of 64" in refused(capsys, "full", "twice")
    assert "nf4 block size 96 is not one of 64, 128" in refused(capsys, "base", "x", "--block_size", "96")
    assert "no such directory" in refused(capsys, "./absent", "x")
    assert "nf5" in refused(capsys, "base", "x", "--data_type", "nf5")
    assert "output" in refused(capsys, "base")
    (Path("bare")).mkdir()
    shutil.copy("base/config.json", "bare")
    assert "no weights in bare" in refused(capsys, "bare", "x")
    assert not Path("x").exists()
    assert {path: path.stat().st_mtime_ns for path in Path("full").iterdir()} == before


def test_a_run_that_asks_for_another_quantisation_than_the_files(capsys):
    quantize("base", "nf4-only")
    capsys.readouterr()
    flags = "--name x --model.name nf4-only --model.quantization int8 --data.train_file train.txt"
    with pytest.raises(SystemExit):
        train_command.main([*tiny_runs.COMMON.split(), *flags.split()], prog="train.py")
    error = capsys.readouterr().err
    assert "in nf4 in blocks of 64 with double quantisation, and int8 was asked for" in error
    assert error.count("\n") == 1


def test_its_config_is_bitsandbytes():
    quantize("base", "config", "--data_type", "fp4", "--double_quantization", "false")
    found = json.loads(Path("config/config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "bitsandbytes"
    assert (found["load_in_4bit"], found["load_in_8bit"]) == (True, False)
    assert (found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"]) == ("fp4", False)
    assert found["llm_int8_skip_modules"] == ["classifier", "cls", "qa_outputs"]
