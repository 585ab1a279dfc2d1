"""Adapters trained here, loaded by torch PEFT: the same logits, from files that hold what they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_side
from tiers import slow_but
from trained import Case, our_logits

from jaxpeft import BaseInfo, Hira, Lora, load_adapter, load_model, save_adapter, save_model
from jaxpeft.config import AdapterConfig, DataConfig, RunConfig

SPARSE = Case("distilbert", "sparse", head="old")
NEW_HEADS = {
    Case("bert", "sparse"): "cls.predictions.bias",
    Case("distilbert", "hira"): "vocab_projector.bias",
    Case("roberta", "lora"): "lm_head.bias",
}
CASES = [
    Case("bert", "lora", head="old", layers=2),
    Case("bert", "head", head="old"),
    SPARSE,
    Case("roberta", "hira", head="old"),
    *NEW_HEADS,
    Case("distilbert", "head"),
    Case("bert", "hira", "classification", num_labels=3),
    Case("distilbert", "lora", "classification"),
    Case("roberta", "sparse", "classification"),
    Case("roberta", "head", "classification", num_labels=3),
]


@pytest.fixture(params=slow_but(CASES, CASES[0], SPARSE, CASES[7], CASES[-1]))
def run(request, trained):
    return trained(request.param)


def assert_same_logits(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_peft_computes_the_same_logits(run, tmp_path):
    case = run.case
    # An old head: the very weights that were trained on, by our own export. A new one, as a user has it: torch draws a
    # head of its own, and the adapter's file takes its place.
    base = save_model(tmp_path, run.model, run.model.params).parent if case.head == "old" else run.base
    before = run.logits(adapters=run.adapted.adapters, masks={})
    ours = run.logits()
    assert np.abs(ours - before).max() > 0.1
    peft = torch_side.load_peft(torch_side.load_torch(base, case.task, num_labels=case.num_labels), run.directory)
    assert_same_logits(ours, torch_side.torch_logits(peft, run.inputs))


def test_what_the_file_holds(run):
    tensors, config = torch_side.tensors_of(run.directory), torch_side.config_of(run.directory)
    assert not [key for key in tensors if "embedding" in key or "decoder" in key]
    assert sum(tensor.size for tensor in tensors.values()) == sum(x.size for x in jax.tree.leaves(run.adapters))
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    assert all(np.any(tensor) for tensor in tensors.values())
    assert config["peft_type"] == ("HIRA" if run.case.method == "hira" else "LORA")
    assert ("lora_alpha" in config) == (run.case.method != "hira")
    if run.case.task == "classification":
        assert config["task_type"] == "SEQ_CLS"
    else:
        assert config["task_type"] is None
        assert config["auto_mapping"]["base_model_class"] == run.model.torch_class


def test_it_loads_here_as_it_was(run):
    frozen, adapters, method = load_adapter(run.directory, run.model.params)
    jax.tree.map(np.testing.assert_array_equal, adapters, run.adapters)
    jax.tree.map(np.testing.assert_array_equal, frozen, run.adapted.frozen)
    assert method == run.adapted.method
    assert isinstance(method, {"hira": Hira, "head": type(None)}.get(run.case.method, Lora))
    np.testing.assert_array_equal(run.logits(frozen=frozen, adapters=adapters, masks={}), run.logits())


@pytest.mark.parametrize("case", slow_but([case for case in CASES if case.method == "sparse"], SPARSE))
def test_half_of_every_tensor_is_zero(case, trained):
    tensors = torch_side.tensors_of(trained(case).directory)
    adapter = {key: tensor for key, tensor in tensors.items() if "lora_" in key}
    assert len(adapter) == 4
    for tensor in adapter.values():
        assert np.count_nonzero(tensor) == round(tensor.size / 2)


@pytest.mark.parametrize("case", slow_but(NEW_HEADS, Case("bert", "sparse")))
def test_a_new_heads_bias_is_in_the_file_and_in_peft(case, trained):
    run, name = trained(case), NEW_HEADS[case]
    bias = torch_side.tensors_of(run.directory)[f"base_model.model.{name}"]
    assert np.abs(bias).min() > 1e-3
    peft = torch_side.load_peft(torch_side.load_torch(run.base), run.directory)
    np.testing.assert_array_equal(peft.get_base_model().get_parameter(name).detach(), bias)
    np.testing.assert_array_equal(peft.get_base_model().get_output_embeddings().bias.detach(), bias)


@pytest.mark.parametrize("case", [SPARSE, Case("distilbert", "lora", "classification"), *NEW_HEADS], ids=str)
def test_what_peft_saves_again_loads_here(case, trained, tmp_path):
    from peft import PeftModel

    run = trained(case)
    base = torch_side.load_torch(run.base, case.task, num_labels=case.num_labels)
    PeftModel.from_pretrained(base, run.directory, is_trainable=True).save_pretrained(tmp_path)
    before, after = torch_side.tensors_of(run.directory), torch_side.tensors_of(tmp_path)
    # The limit of a bare bias: PEFT reads it and does not write it.
    lost = {f"base_model.model.{NEW_HEADS[case]}"} if case in NEW_HEADS else set()
    assert before.keys() - after.keys() == lost
    assert not after.keys() - before.keys()
    assert all(after[key].tobytes() == before[key].tobytes() for key in after)
    _, adapters, method = load_adapter(tmp_path, run.model.params)
    assert method == run.adapted.method
    jax.tree.map(np.testing.assert_array_equal, adapters["sites"], run.adapters["sites"])


def test_the_config_alone_names_the_base(trained):
    from peft import AutoPeftModel, AutoPeftModelForSequenceClassification

    masked, labelled = trained(CASES[0]), trained(Case("distilbert", "lora", "classification"))
    assert_same_logits(
        masked.logits(), torch_side.torch_logits(AutoPeftModel.from_pretrained(masked.directory).eval(), masked.inputs)
    )
    peft = AutoPeftModelForSequenceClassification.from_pretrained(labelled.directory).eval()
    assert_same_logits(labelled.logits(), torch_side.torch_logits(peft, labelled.inputs))


def test_an_adapter_goes_onto_a_4_bit_base(trained):
    from jaxpeft.models.build import Quantization

    run = trained(Case("bert", "hira", "classification", num_labels=3))
    model = load_model(str(run.base), "classification", num_labels=3, quantization=Quantization())
    frozen, adapters, method = load_adapter(run.directory, model.params)
    assert method == run.adapted.method
    difference = np.abs(run.logits(frozen=frozen, adapters=adapters) - run.logits()).max()
    assert 0 < difference < 1


TARGETS = {
    "all-linear-and-a-new-head": ("bert", "encoder", "masked-lm", {"target_modules": "all-linear"}),
    "all-linear-but": (
        "roberta",
        "masked-lm",
        "masked-lm",
        {"target_modules": "all-linear", "exclude_modules": ["key"], "method": "hira"},
    ),
    "all-linear-and-two-heads": ("distilbert", "encoder", "classification", {"target_modules": "all-linear"}),
    "all-linear-and-a-deep-head": ("roberta", "encoder", "classification", {"target_modules": "all-linear"}),
    "regex": ("distilbert", "masked-lm", "masked-lm", {"target_modules": r".*\.1\..*lin\d?", "method": "hira"}),
    "a-part-of-the-head": (
        "bert",
        "masked-lm",
        "masked-lm",
        {"target_modules": ["key"], "modules_to_save": ["transform"]},
    ),
    "a-layer-of-the-base": ("bert", "encoder", "classification", {"modules_to_save": ["pooler.dense"]}),
}


@pytest.mark.parametrize("name", slow_but(TARGETS, "all-linear-and-a-new-head", "regex", "a-part-of-the-head"))
def test_the_layers_are_the_same_ones_in_peft(name, tmp_path):
    model_type, kind, task, options = TARGETS[name]
    base = torch_side.write_base(tmp_path / "base", model_type, kind, layers=2)
    model = load_model(str(base), task)
    config = RunConfig(task=task, data=DataConfig(train_file="none.txt"), adapter=AdapterConfig(rank=4, **options))
    adapted = tiny.prepared(config, model)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    adapters = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, jnp.float32), adapted.adapters)
    save_adapter(
        tmp_path / "adapter",
        adapters,
        adapted.method,
        base=BaseInfo.of(model),
        target_modules=adapted.target_modules,
        exclude_modules=config.adapter.exclude_modules,
    )
    inputs = torch_side.batch(model_type)
    ours = our_logits(model, frozen=adapted.frozen, adapters=adapters, method=adapted.method, inputs=inputs)
    peft = torch_side.load_peft(torch_side.load_torch(base, task), tmp_path / "adapter")
    assert_same_logits(ours, torch_side.torch_logits(peft, inputs))
