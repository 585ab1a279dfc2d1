"""A new adapter method is one new file and one line in a registry: trained, exported, loaded again, and described."""

import json
from dataclasses import fields
from typing import Literal

import jax
import numpy as np
import pytest
import tiny
import tiny_runs
import torch_side
from toy_method import Toy

from jaxpeft import BaseInfo, InputError, RunConfig, apply, load_adapter, load_run, merge, save_adapter, train
from jaxpeft.adapters import METHODS
from jaxpeft.config import AdapterConfig, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig
from jaxpeft.config.parsing import run_values_parser
from jaxpeft.report.methods import descriptions, methods_table
from jaxpeft.runs.adapters import build_method


@pytest.fixture
def toy(monkeypatch):
    """The line in the registry, as if it had stood there when the configuration's file was read."""
    monkeypatch.setitem(METHODS._places, "toy-rank-one", "toy_method:Toy")
    monkeypatch.setattr("jaxpeft.config.adapter.MethodName", Literal[(*METHODS, "full", "head")])
    run_values_parser.cache_clear()  # made while the line was not there
    yield
    run_values_parser.cache_clear()


def config_of(**adapter):
    return RunConfig(
        name="toy",
        model=ModelConfig(name="base"),
        data=DataConfig(train_file="train.txt", validation_file="validation.txt", max_length=16),
        adapter=AdapterConfig(method="toy-rank-one", target_modules=["query", "value"], **adapter),
        training=TrainingConfig(num_steps=3, batch_size=4, warmup_steps=1, learning_rate=1e-2, eval_every_steps=3),
        evaluation=EvaluationConfig(batch_size=8, max_batches=1, max_test_batches=1),
    )


@pytest.mark.usefixtures("toy")
def test_a_new_method_trains_and_its_run_loads(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_runs.workplace(tmp_path_factory))
    config = RunConfig(**{**vars(config_of(options={"gamma": 2.0})), "output_dir": str(tmp_path)})
    train(config)
    run = load_run(tmp_path / "toy")
    assert run.objective.method == Toy(gamma=2.0)
    assert all((site["v"] != 0).any() for site in run.adapters["sites"].values())
    card = (tmp_path / "toy" / "adapter" / "README.md").read_text()
    assert "PEFT does not have this method and cannot load the files; `jaxpeft.load_adapter` can." in card
    assert "library_name: jaxpeft" in card
    assert "from peft import" not in card
    assert "Toy: Nobody 2026" in card


@pytest.mark.usefixtures("toy")
def test_its_files_go_round(bases, tmp_path):
    _, model = bases("bert", "masked-lm")
    method = Toy(gamma=2.0, marks=("one", "two"))
    frozen, adapters = tiny.adapted(model, method)
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "JAXPEFT_TOY_RANK_ONE"
    assert config["jaxpeft_options"] == {"gamma": 2.0, "marks": ["one", "two"]}
    keys = set(torch_side.tensors_of(tmp_path))
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.jaxpeft.u" in keys

    again, read, loaded = load_adapter(tmp_path, model.params)
    assert loaded == method
    jax.tree.map(np.testing.assert_array_equal, (again, read), (frozen, adapters))
    inputs = model.inputs(tiny.batch())
    ours = apply(model.module, again, read, loaded, **inputs).logits
    merged = model.module.apply({"params": merge(again, read, loaded)}, **inputs).logits
    np.testing.assert_allclose(ours, merged, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("toy")
def test_peft_refuses_its_files(bases, tmp_path):
    from peft import PeftModel

    base, model = bases("bert", "masked-lm")
    _, adapters = tiny.adapted(model, Toy())
    save_adapter(tmp_path, adapters, Toy(), base=BaseInfo.of(model))
    with pytest.raises(Exception, match="JAXPEFT_TOY_RANK_ONE"):
        PeftModel.from_pretrained(torch_side.load_torch(base), tmp_path)


def test_files_of_a_method_that_is_not_here(bases, tmp_path):
    _, model = bases("bert", "masked-lm")
    _, adapters = tiny.adapted(model, Toy())
    save_adapter(tmp_path, adapters, Toy(), base=BaseInfo.of(model))
    with pytest.raises(InputError, match=r"JAXPEFT_TOY_RANK_ONE' belongs to a method that is not in .*METHODS"):
        load_adapter(tmp_path, model.params)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda config, tensors: config["jaxpeft_options"].update(gama=1),
            "has no option 'gama'; did you mean 'gamma'",
        ),
        (lambda config, tensors: config["jaxpeft_options"].update(gamma="x"), "gamma of toy-rank-one must be a float"),
        (
            lambda config, tensors: [tensors.pop(key) for key in [*tensors] if key.endswith(".v")],
            "has no v; .*incomplete",
        ),
    ],
)
def test_damaged_files(damage, message, bases, tmp_path):
    from safetensors.numpy import save_file

    _, model = bases("bert", "masked-lm")
    _, adapters = tiny.adapted(model, Toy())
    weights = save_adapter(tmp_path, adapters, Toy(), base=BaseInfo.of(model))
    config, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), torch_side.tensors_of(tmp_path)
    damage(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, weights)
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path, model.params)


@pytest.mark.usefixtures("toy")
def test_its_options_and_its_place_in_the_table():
    assert build_method(config_of(options={"gamma": 3}).adapter) == Toy(gamma=3)
    for options, message in {
        "gama": "adapter.options: the method toy-rank-one has no option 'gama'; did you mean 'gamma'",
        "rank": "adapter.options has 'rank', which has a flag of its own: set adapter.rank 4",
    }.items():
        with pytest.raises(InputError, match=message):
            build_method(config_of(options={options: 4}).adapter)
    assert list(descriptions())[-3:] == ["toy-rank-one", "full", "head"]
    row = "| [Toy](jaxpeft/toy_method.py) | W = W₀ + γ·uv | Nobody 2026 | 7 | – | – | never |"
    assert row in methods_table({"toy-rank-one": 7}, {})


def test_a_method_without_its_line_is_refused():
    with pytest.raises(InputError, match=r"there is no adapter\.method 'toy-rank-one'; choose from lora, "):
        config_of()
    with pytest.raises(InputError, match=r"there is no adapter\.method 'lroa'; did you mean 'lora'"):
        AdapterConfig(method="lroa")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_describes_itself(name):
    kind = METHODS[name]
    assert kind.name == name
    assert all((kind.description.title, kind.description.equation, kind.description.source, kind.description.advice))
    assert set(kind.shareable) <= {field.name for field in fields(kind)}
