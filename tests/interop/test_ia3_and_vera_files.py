"""What in (IA)³'s and VeRA's files depends on more than the method's own options."""

import json

import jax
import numpy as np
import pytest
import torch_side
from safetensors.numpy import save_file

from jaxpeft import BaseInfo, InputError, init_adapters, load_adapter, match_targets, save_adapter
from jaxpeft.adapters import Ia3, Vera

WEIGHTS = "adapter_model.safetensors"
FEEDFORWARD = ["1.output.dense", "intermediate.dense"]
TARGETS = ["key", "output.dense", "intermediate.dense"]


@pytest.fixture
def bert(bases):
    return bases("bert", "masked-lm")


def write(directory, model, method, targets=("query",), **options):
    sites = match_targets(model.sites(), list(targets), exclude_modules=options.get("exclude_modules"))
    frozen, adapters = init_adapters(model.params, method, sites, rng=jax.random.key(0))
    options.setdefault("frozen", frozen)
    save_adapter(directory, adapters, method, base=BaseInfo.of(model), **options)
    return frozen, adapters


def test_feedforward_modules_beside_full_names_are_an_expression_that_peft_reads_as_the_list(bert, tmp_path):
    base, model = bert
    method = Ia3(feedforward_modules=FEEDFORWARD)
    _, adapters = write(tmp_path, model, method, TARGETS)
    assert torch_side.config_of(tmp_path)["feedforward_modules"] == r".*(1\.output\.dense|intermediate\.dense)"
    _, loaded, again = load_adapter(tmp_path, model.params)
    assert again == method
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path)
    scaled = {
        name for name, module in peft.base_model.model.named_modules() if getattr(module, "is_feedforward", False)
    }
    assert scaled == {
        name for name in (path.replace("/", ".") for path in adapters["sites"]) if name.endswith(tuple(FEEDFORWARD))
    }
    assert len(scaled) == 3  # of both layers the intermediate, of the second the output


@pytest.mark.parametrize("modules", [["output.dense"], r".*\.(output|other)\.dense", []], ids=str)
def test_feedforward_modules_beside_the_names_they_are_among_stay_as_they_are(modules, bert, tmp_path):
    write(tmp_path, bert[1], Ia3(feedforward_modules=modules), TARGETS, target_modules=TARGETS)
    assert torch_side.config_of(tmp_path)["feedforward_modules"] == modules
    assert load_adapter(tmp_path, bert[1].params)[2] == Ia3(feedforward_modules=modules)


def test_ia3_without_feedforward_modules_is_refused(bert, tmp_path):
    write(tmp_path, bert[1], Ia3())
    change(tmp_path, feedforward_modules=None)
    with pytest.raises(InputError, match=r"names no feedforward_modules; .* or \[\]"):
        load_adapter(tmp_path, bert[1].params)


def test_vera_names_its_layers_in_full_where_some_are_excluded(bert, tmp_path):
    base, model = bert
    write(tmp_path, model, Vera(rank=4), ["dense"], target_modules=["dense"], exclude_modules=["output.dense"])
    config = torch_side.config_of(tmp_path)
    assert "exclude_modules" not in config
    layers = [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    assert config["target_modules"] == [*layers, "cls.predictions.transform.dense"]
    torch_side.load_peft(torch_side.load_torch(base), tmp_path)


def change(directory, **values):
    config = {**torch_side.config_of(directory), **values}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def change_factor(directory, key, value):
    tensors = torch_side.tensors_of(directory)
    del tensors[key]
    save_file({**tensors, **({} if value is None else {key: value})}, directory / WEIGHTS)


SPOILT = {
    "lost": (
        lambda d: change_factor(d, "base_model.vera_A", None),
        r"the adapter has no base_model\.vera_A; the file is incomp",
    ),
    "other-width": (
        lambda d: change_factor(d, "base_model.vera_B", np.zeros((8, 4), "f4")),
        r"base_model\.vera_B of the adapter has shape \(8, 4\), .* ask for \(32, 4\)",
    ),
    "biases": (lambda d: change(d, bias="all"), r"adapter_config\.json: bias='all' is not supported"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_vera_without_its_factors_is_refused(name, bert, tmp_path):
    spoil, message = SPOILT[name]
    write(tmp_path, bert[1], Vera(rank=4))
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(tmp_path, bert[1].params)
    assert "\n" not in str(caught.value)


def test_vera_cannot_be_saved_without_the_frozen_factors(bert, tmp_path):
    with pytest.raises(InputError, match="frozen="):
        write(tmp_path, bert[1], Vera(rank=4), frozen=None)
