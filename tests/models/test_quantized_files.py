"""Quantised checkpoints: ours in torch through bitsandbytes, bitsandbytes' here, and the same arrays either way."""

import bitsandbytes_side
import chex
import jax
import numpy as np
import pytest
import torch_side
from tiers import slow
from trained import our_logits

from jaxpeft import Quantization, load_model, save_model
from jaxpeft.merging import merge
from jaxpeft.models.quantized_files import read_quantized, stored_tensors
from jaxpeft.quantization import NUMBER_FORMATS, dequantize, is_quantized, quantize
from jaxpeft.quantization.dynamic_map import create_dynamic_map
from jaxpeft.trees import leaf_paths

NOTHING = {"adapters": {"sites": {}, "modules": {}}, "method": None}
NF4 = Quantization()
SCHEMES = {
    "nf4-double": NF4,
    "nf4-128": Quantization("nf4", 128, False),
    "fp4-double": Quantization("fp4"),
    "int8": Quantization("int8"),
}
# Of the largest logit. Both sides multiply float32 activations with equal kernels: what is left is the order of sums of up
# to 256 products, through six layers and norms; 2.3e-6 at most was seen (float32's own step is 1.2e-7).
BOUND = 5e-6

pytestmark = pytest.mark.xdist_group("quantized-files")


def logits(model, inputs):
    return our_logits(model, frozen=model.params, inputs=inputs, **NOTHING)


def assert_close(actual, desired, bound=BOUND):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=bound * np.abs(desired).max())


def held(model):
    """The quantised leaves by path."""
    return {path: leaf for path, leaf in leaf_paths(model.params).items() if is_quantized(leaf)}


def assert_same_logits(directory, model_type, task, num_layers, scheme):
    """Of the directory, in torch and here; for int8 once with float activations and once as bitsandbytes computes."""
    inputs, model = torch_side.batch(model_type), load_model(str(directory), task)
    assert model.missing == ()
    assert len(held(model)) == num_layers
    mine = logits(model, inputs)
    in_torch = bitsandbytes_side.load(directory, task)
    assert len(bitsandbytes_side.quantized_layers(in_torch)) == num_layers
    if scheme == "int8":
        # LLM.int8() rounds activations to 8 bits as well, off by up to 1/254 of a row's maximum at each of six layers: 3 %.
        assert_close(mine, torch_side.torch_logits(in_torch, inputs), bound=0.05)
        in_torch = bitsandbytes_side.with_float_activations(in_torch)
    assert_close(mine, torch_side.torch_logits(in_torch, inputs))


@pytest.mark.parametrize(
    ("scheme", "model_type", "task", "num_layers"),
    [
        *((scheme, "bert", "masked-lm", 6) for scheme in SCHEMES),
        ("nf4-double", "bert", "classification", 7),  # and the pooler
        pytest.param("fp4-double", "distilbert", "classification", 6, marks=slow),
        pytest.param("nf4-128", "roberta", "masked-lm", 6, marks=slow),
    ],
)
def test_torch_loads_what_we_write(ours, scheme, model_type, task, num_layers):
    bitsandbytes_side.required()
    assert_same_logits(ours(SCHEMES[scheme], model_type, task), model_type, task, num_layers, scheme)


DOUBLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
WRITTEN = {
    "nf4-double": ("bert", "masked-lm", DOUBLE, 6),
    "fp4": ("bert", "classification", {"load_in_4bit": True}, 7),
    "nf4-double-head": ("distilbert", "masked-lm", DOUBLE, 7),  # transformers quantises vocab_transform as well
    "int8": ("bert", "masked-lm", {"load_in_8bit": True}, 6),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_torch_writes_loads_here(theirs, name):
    model_type, task, options, num_layers = WRITTEN[name]
    assert_same_logits(theirs(model_type, task, **options), model_type, task, num_layers, name)


def test_arrays_of_bitsandbytes_file_are_held_as_they_are(theirs):
    directory = theirs(**DOUBLE)
    file = torch_side.tensors_of(directory, "model.safetensors")
    for path, tensor in held(load_model(str(directory), "masked-lm")).items():
        name = path.removesuffix("/kernel").replace("/", ".") + ".weight"
        np.testing.assert_array_equal(tensor.codes, file[name].reshape(-1))
        np.testing.assert_array_equal(tensor.absmax.codes, file[f"{name}.absmax"])
        np.testing.assert_array_equal(tensor.absmax.nested_absmax, file[f"{name}.nested_absmax"])
        again = stored_tensors(name, tensor)
        assert again.keys() == {key for key in file if key.startswith(name)}
        for key, array in again.items():
            np.testing.assert_array_equal(array, file[key])  # the JSON too


def test_codes_stored_as_bfloat16(theirs):
    import torch

    plain = held(load_model(str(theirs(**DOUBLE)), "masked-lm"))
    directory = theirs(bnb_4bit_quant_storage=torch.bfloat16, **DOUBLE)
    chex.assert_trees_all_equal(held(load_model(str(directory), "masked-lm")), plain)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_written_base_is_the_one_quantised_while_loading(base, ours, scheme):
    """Bit for bit, and taken either by not asking or by asking for the same."""
    expected = load_model(str(base()), "masked-lm", quantization=scheme)
    assert expected.quantization == scheme
    for asked in (None, scheme):
        loaded = load_model(str(ours(scheme)), "masked-lm", quantization=asked)
        assert loaded.quantization == scheme
        chex.assert_trees_all_equal(loaded.params, expected.params)
        assert jax.tree.structure(loaded.params) == jax.tree.structure(expected.params)


def test_a_bare_encoder_is_written_without_a_head(base, ours):
    directory = ours(NF4, "bert", "encoder")
    names = torch_side.tensors_of(directory, "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"embeddings", "encoder", "pooler"}
    for task, num_layers in (("masked-lm", 6), ("classification", 7)):
        model = load_model(str(directory), task)
        expected = load_model(str(base("bert", "encoder")), task, quantization=NF4)
        assert set(model.missing) == set(expected.missing) != set()
        assert len(held(model)) == num_layers
        chex.assert_trees_all_equal(model.params["bert"], expected.params["bert"])


def test_torch_loads_a_bare_encoder(ours):
    bitsandbytes_side.required()
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    inputs, outputs = torch_side.batch("bert"), []
    for auto, asked, num_layers in (
        (AutoModel, None, 7),
        (AutoModelForSequenceClassification, None, 7),
        # transformers 4.57 cannot leave out a quantised pooler that the model has no place for: written for the task.
        (AutoModelForMaskedLM, "masked-lm", 6),
    ):
        directory = ours(NF4, "bert", "encoder", asked)
        model, loading = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        assert all(key.startswith(("cls.", "classifier.")) for key in loading["missing_keys"])
        assert not loading["unexpected_keys"]
        assert len(bitsandbytes_side.quantized_layers(model)) == num_layers
        model = model.base_model
        tensors = {key: torch.tensor(value, dtype=torch.long) for key, value in inputs.items()}
        with torch.no_grad():
            outputs.append(bitsandbytes_side.in_float32(model.eval())(**tensors).last_hidden_state.numpy())
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


def test_what_trains_whole_is_dequantised(theirs):
    directory = str(theirs(*WRITTEN["nf4-double-head"][:2], **DOUBLE))
    stored = load_model(directory, "masked-lm").params["vocab_transform"]["kernel"]
    model = load_model(directory, "masked-lm", trained_leaves=lambda leaves, prefix: {"vocab_transform/kernel"})
    kernel = model.params["vocab_transform"]["kernel"]
    assert is_quantized(stored)
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, dequantize(stored))
    assert len(held(model)) == 6


def test_a_merged_model_no_longer_says_that_it_is_quantised(ours, tmp_path):
    model, inputs = load_model(str(ours()), "masked-lm"), torch_side.batch("bert")
    save_model(tmp_path, model, merge(model.params, NOTHING["adapters"]))
    assert "quantization_config" not in torch_side.config_of(tmp_path, "config.json")
    again = load_model(str(tmp_path), "masked-lm")
    assert again.quantization is None
    assert_close(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(64, 48), (13, 11), (600, 700)])
def test_tensors_survive_the_file(scheme, shape):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    tensor = quantize(kernel, **vars(scheme))
    file = stored_tensors("x.weight", tensor)
    again = read_quantized("x.weight", file, file.__getitem__)
    chex.assert_trees_all_equal(again, tensor)
    assert jax.tree.structure(again) == jax.tree.structure(tensor)


# Made by bitsandbytes 0.50.2, torch 2.13.0+cpu: quantize_4bit(kernel.T, quant_type="fp4", compress_statistics=True) of the
# kernel [13, 11] in tests/quant/test_four_bit.py, then QuantState.as_dict(packed=True).
GOLDEN_STATE = (
    b'{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [11, 13], "nested_blocksize": 256, '
    b'"nested_dtype": "float32", "nested_offset": 1.1100260019302368}'
)
GOLDEN_CODES = bytes.fromhex(
    "f71c31f4c2e6dc5569c4eb1f7dda3661cb69d4daaefda361fa59a9991199fa369e9653ecda3676e62a916526744e5a97dce164529397c62e"
    "965266e6c7a84c957c6e26b1c63c6dc0"
)
GOLDEN_FIRST = [-0.2857697606086731, -0.38102635741233826, -0.5715395212173462, -0.7620527148246765]


def golden():
    return {
        "x.weight": np.frombuffer(GOLDEN_CODES, np.uint8).reshape(-1, 1),
        "x.weight.absmax": np.uint8([201, 237, 0]),
        "x.weight.quant_map": NUMBER_FORMATS["fp4"].codebook.values,
        "x.weight.nested_absmax": np.float32([0.13346350193023682]),
        "x.weight.nested_quant_map": create_dynamic_map(),
        "x.weight.quant_state.bitsandbytes__fp4": np.frombuffer(GOLDEN_STATE, np.uint8),
    }


def test_golden_file():
    file = golden()
    tensor = read_quantized("x.weight", file, file.__getitem__)
    assert (tensor.shape, tensor.block_size, tensor.data_type) == ((13, 11), 64, "fp4")
    np.testing.assert_allclose(dequantize(tensor)[0, :4], GOLDEN_FIRST, rtol=0, atol=5e-7)
    for name, array in stored_tensors("x.weight", tensor).items():
        np.testing.assert_array_equal(array, file[name])
