"""BitFit: which parameters train, and the file that makes PEFT one; parity in training is interop/test_parity.py's."""

import chex
import numpy as np
import pytest
import tiny
import torch_side
from test_ln_tuning import moved
from tiers import slow

from jaxpeft import BaseInfo, load_adapter, load_model, save_adapter
from jaxpeft.adapters import BitFit, Lora
from jaxpeft.inject import apply
from jaxpeft.models.build import Quantization
from jaxpeft.training.step import make_train_step
from jaxpeft.trees import by_leaf, leaf_paths


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta"])
def test_every_bias_trains_and_nothing_else(tiny_models, model_type):
    leaves = leaf_paths(tiny_models(model_type).params)
    chosen = BitFit().fully_trained(leaves, ())
    assert chosen == {path for path in leaves if path.endswith("bias")}
    # Six linear layers and two norms in each of two layers, the embeddings' norm, and the head's dense, norm and decoder.
    assert len(chosen) == 2 * (6 + 2) + 1 + 3


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=slow, id="fp32"), pytest.param({"quantization": Quantization()}, id="nf4")]
)
def test_training_changes_the_biases_alone(tiny_models, options):
    model = tiny_models("distilbert", config={"n_layers": 1}, **options)
    whole = BitFit().fully_trained(leaf_paths(model.params), ())
    objective, optimizer, frozen, state = tiny.training(model, BitFit(), fully_trained=whole)
    before, base = by_leaf(tiny.snapshot(state.adapters)["modules"]), tiny.snapshot(frozen)
    step, losses = make_train_step(objective, optimizer), []
    for _ in range(8):
        state, metrics = step(state, frozen, tiny.batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal(tiny.snapshot(frozen), base)
    after = by_leaf(tiny.snapshot(state.adapters)["modules"])
    assert after.keys() == before.keys() == whole
    assert all((after[path] != before[path]).any() for path in whole)


@pytest.mark.parametrize(
    ("model_type", "task"), [("bert", "masked-lm"), ("distilbert", "masked-lm"), ("roberta", "classification")]
)
def test_peft_loads_it_as_a_lora_without_layers(tmp_path, model_type, task):
    base = torch_side.write_base(tmp_path / "base", model_type, task, layers=1)
    model = load_model(str(base), task)
    head = [path for path in leaf_paths(model.params) if path.startswith("classifier/") and path.endswith("kernel")]
    frozen, adapters = moved(model, BitFit(), head)
    save_adapter(tmp_path / "ours", adapters, BitFit(), base=BaseInfo.of(model))
    config = torch_side.config_of(tmp_path / "ours")
    assert (config["peft_type"], config["bias"], config["target_modules"]) == ("LORA", "all", "dummy-target-modules")
    assert config["modules_to_save"] == (["classifier"] if task == "classification" else None)
    peft = torch_side.load_peft(torch_side.load_torch(base, task), tmp_path / "ours")
    inputs = torch_side.batch(model_type)
    ours = apply(model.module, frozen, adapters, **model.inputs(inputs)).logits
    plain = torch_side.torch_logits(torch_side.load_torch(base, task), inputs)
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(ours, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-5)
    _, again, method = load_adapter(tmp_path / "ours", model.params)
    assert method == BitFit()
    chex.assert_trees_all_equal(again, adapters)


def test_only_a_file_of_biases_is_bitfit(tmp_path):
    base = torch_side.write_base(tmp_path / "base", "bert", layers=1)
    model = load_model(str(base), "masked-lm")
    _, lora = tiny.adapted(
        model, Lora(bias="all"), fully_trained=Lora(bias="all").fully_trained(leaf_paths(model.params), ())
    )
    save_adapter(tmp_path / "lora", lora, Lora(bias="all"), base=BaseInfo.of(model))
    assert load_adapter(tmp_path / "lora", model.params)[2] == Lora(bias="all")
    _, head = tiny.adapted(model, None, fully_trained=["cls/predictions/bias"])
    save_adapter(tmp_path / "head", {"sites": {}, "modules": head["modules"]}, None, base=BaseInfo.of(model))
    assert load_adapter(tmp_path / "head", model.params)[2] is None
