"""Merged models: plain transformers models, in torch and here."""

import numpy as np
import pytest
import torch_side
from tiers import slow_but
from trained import Case, our_logits

from jaxpeft import load_model, save_model
from jaxpeft.merging import merge
from jaxpeft.models.build import Quantization

CASES = [
    Case("bert", "lora", head="old", layers=2),
    Case("bert", "hira", "classification", num_labels=3),
    Case("distilbert", "hira"),
    Case("distilbert", "lora", "classification"),
    Case("roberta", "hira", head="old"),
    Case("roberta", "sparse", "classification"),
]
NAMES = ("bad", "good", "so-so")


@pytest.fixture(params=slow_but(CASES, CASES[0], CASES[-1]))
def merged(request, trained, tmp_path):
    """The trained case, and the directory of its merged model."""
    run = trained(request.param)
    params = merge(run.adapted.frozen, run.adapters, run.adapted.method, masks=run.masks)
    labels = NAMES[: run.case.num_labels] if run.case.task == "classification" else None
    save_model(tmp_path, run.model, params, label_names=labels)
    return run, tmp_path


def test_torch_loads_it_whole_and_computes_the_same(merged):
    run, directory = merged
    model, loading = torch_side.load_torch(directory, run.case.task, output_loading_info=True)
    assert loading["missing_keys"] == []
    assert loading["unexpected_keys"] == []
    np.testing.assert_allclose(run.logits(), torch_side.torch_logits(model, run.inputs), rtol=0, atol=1e-5)


def test_it_is_a_base_here(merged):
    run, directory = merged
    model = load_model(str(directory), run.case.task)
    assert model.missing == ()
    again = our_logits(
        model, frozen=model.params, adapters={"sites": {}, "modules": {}}, method=None, inputs=run.inputs
    )
    np.testing.assert_allclose(run.logits(), again, rtol=0, atol=1e-5)


def test_its_config_names_class_and_labels(merged):
    run, directory = merged
    config = torch_side.config_of(directory, "config.json")
    assert config["architectures"] == [run.model.torch_class]
    if run.case.task == "classification":
        names = NAMES[: run.case.num_labels]
        assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
        assert config["label2id"] == {name: i for i, name in enumerate(names)}


def test_a_4_bit_base_merges_into_full_precision(trained, tmp_path):
    run = trained(CASES[0])
    model = load_model(str(run.base), "masked-lm", quantization=Quantization())
    logits = run.logits(frozen=model.params)
    save_model(tmp_path, model, merge(model.params, run.adapters, run.adapted.method))
    theirs = torch_side.torch_logits(torch_side.load_torch(tmp_path), run.inputs)
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=1e-5)


def test_a_half_precision_base_is_saved_in_single(trained, tmp_path):
    """The config must say what the file holds, for those who load with dtype="auto"."""
    import torch

    run = trained(CASES[0])
    base = torch_side.load_torch(run.base, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "half")
    model = load_model(str(tmp_path / "half"), "masked-lm")
    save_model(tmp_path / "merged", model, merge(model.params, run.adapters, run.adapted.method))
    merged = torch_side.load_torch(tmp_path / "merged", dtype="auto")
    assert merged.dtype == torch.float32
    logits = run.logits(frozen=model.params)
    np.testing.assert_allclose(logits, torch_side.torch_logits(merged, run.inputs), rtol=0, atol=1e-5)


def test_the_function_has_its_public_name():
    import jaxpeft

    assert callable(jaxpeft.merge)
