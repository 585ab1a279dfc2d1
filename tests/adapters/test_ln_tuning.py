"""LN tuning: which parameters train, and how their file is written; parity with PEFT is interop/test_parity.py's."""

import chex
import jax
import numpy as np
import pytest
import tiny
import torch_side

from jaxpeft import BaseInfo, load_adapter, load_model, save_adapter
from jaxpeft.adapters import LnTuning
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.merging import merge
from jaxpeft.training.step import make_train_step
from jaxpeft.trees import by_leaf, leaf_paths

# Layer norms of two layers and the embeddings, and of the masked-LM head.
NORMS = {"bert": 2 * 2 + 1 + 1, "roberta": 2 * 2 + 1 + 1, "distilbert": 2 * 2 + 1 + 1}


def trained_by(model, method):
    return sorted(method.fully_trained(leaf_paths(model.params), ()))


@pytest.mark.parametrize("model_type", NORMS)
def test_by_default_every_norm_trains_and_nothing_else(tiny_models, model_type):
    model = tiny_models(model_type)
    leaves = trained_by(model, LnTuning())
    assert len(leaves) == 2 * NORMS[model_type]
    assert all(path.lower().replace("_", "").split("/")[-2].endswith("layernorm") for path in leaves)
    assert {path.rpartition("/")[2] for path in leaves} == {"scale", "bias"}


def test_names_choose_among_the_norms(distilbert):
    layers = {path.rpartition("/")[0] for path in trained_by(distilbert, LnTuning(["sa_layer_norm"]))}
    assert layers == {f"distilbert/transformer/layer/{i}/sa_layer_norm" for i in range(2)}
    regex = LnTuning(r".*layer\.1\..*norm", exclude_modules=["output_layer_norm"])
    assert {path.rpartition("/")[0] for path in trained_by(distilbert, regex)} == {
        "distilbert/transformer/layer/1/sa_layer_norm"
    }


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LnTuning(["sa_layer_norm", "layer_nrom"]), "target_modules 'layer_nrom' matches no layer norm.*did you mean"),
        (
            LnTuning("q_lin"),
            "target_modules 'q_lin' matches no layer norm; the norms end in LayerNorm, output_layer_norm",
        ),
        (LnTuning(["sa_layer_norm"], ["sa_layer_norm"]), "leaves no layer norm to tune"),
    ],
)
def test_what_names_no_norm_is_refused(distilbert, method, message):
    with pytest.raises(InputError, match=message):
        trained_by(distilbert, method)


def test_training_changes_the_norms_alone(tiny_models):
    roberta, method = tiny_models("roberta", config={"num_hidden_layers": 1}), LnTuning()
    whole = trained_by(roberta, method)
    objective, optimizer, frozen, state = tiny.training(roberta, method, fully_trained=whole)
    assert state.adapters["sites"] == {}
    before, base = tiny.snapshot(state.adapters), tiny.snapshot(frozen)
    step = make_train_step(objective, optimizer)
    for i in range(2):
        state, _ = step(state, frozen, tiny.batch(seed=i))
    chex.assert_trees_all_equal(tiny.snapshot(frozen), base)
    after = by_leaf(tiny.snapshot(state.adapters)["modules"])
    assert sorted(after) == whole
    assert all((after[path] != leaf).any() for path, leaf in by_leaf(before["modules"]).items())
    # Nothing is left to do for merging: the norms are the model's own.
    merged = leaf_paths(merge(frozen, state.adapters))
    assert all((merged[path] == after[path]).all() for path in whole)


def moved(model, method, extra=()):
    """`(frozen, adapters)` with every trained leaf moved by noise."""
    whole = [*trained_by(model, method), *extra]
    frozen, adapters = tiny.adapted(model, method, fully_trained=whole)
    noise = {
        path: tiny.normal(i, *leaf.shape, scale=0.2)
        for i, (path, leaf) in enumerate(by_leaf(adapters["modules"]).items())
    }
    modules = {
        layer: {name: leaf + noise[f"{layer}/{name}"] for name, leaf in group.items()}
        for layer, group in adapters["modules"].items()
    }
    return frozen, {"sites": {}, "modules": modules}


@pytest.mark.parametrize("model_type", NORMS)
def test_peft_loads_what_tunes_every_norm(tmp_path, model_type):
    """The head's norm too, for which there is no default in PEFT: a regular expression names them all."""
    base = torch_side.write_base(tmp_path / "base", model_type, layers=1)
    model = load_model(str(base), "masked-lm")
    frozen, adapters = moved(model, LnTuning())
    save_adapter(tmp_path / "ours", adapters, LnTuning(), base=BaseInfo.of(model))
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path / "ours")
    inputs = torch_side.batch(model_type)
    ours = apply(model.module, frozen, adapters, **model.inputs(inputs)).logits
    np.testing.assert_allclose(ours, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-5)
    _, again, method = load_adapter(tmp_path / "ours", model.params)
    assert method == LnTuning()
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


def test_a_norm_that_trains_with_a_new_head_is_the_head_s(tmp_path):
    """PEFT would not find it among the targets: it goes to modules_to_save, like the rest of the head."""
    base = torch_side.write_base(tmp_path / "base", "bert", layers=1)
    model = load_model(str(base), "masked-lm")
    method = LnTuning(["output.LayerNorm"])
    head = [path for path in leaf_paths(model.params) if path.startswith("cls/predictions/transform/")]
    frozen, adapters = moved(model, method, head)
    save_adapter(tmp_path / "ours", adapters, method, base=BaseInfo.of(model))
    keys = torch_side.tensors_of(tmp_path / "ours")
    assert "base_model.model.cls.predictions.transform.LayerNorm.weight" in keys
    assert "base_model.model.bert.encoder.layer.0.output.LayerNorm.ln_tuning_layers.weight" in keys
    assert torch_side.config_of(tmp_path / "ours")["modules_to_save"] == [
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.transform.dense",
    ]
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path / "ours")
    inputs = torch_side.batch("bert")
    ours = apply(model.module, frozen, adapters, **model.inputs(inputs)).logits
    np.testing.assert_allclose(ours, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-5)
