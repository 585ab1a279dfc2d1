"""Quantised checkpoints that are refused: malformed files, and files that are not what was asked for."""

import dataclasses
import json

import numpy as np
import pytest
import torch_side

from jaxpeft import InputError, Quantization, load_model, quantize_model
from jaxpeft.models.quantized_files import quantization_config, stored_tensors
from jaxpeft.quantization import quantize

pytestmark = pytest.mark.xdist_group("quantized-files")

ASKED = {
    "another data type": (Quantization("fp4"), "fp4 in blocks of 64 with double quantisation"),
    "another block size": (Quantization("nf4", 128), "nf4 in blocks of 128 with double quantisation"),
    "other scales": (Quantization("nf4", 64, False), "nf4 in blocks of 64 without double quantisation"),
    "int8": (Quantization("int8"), "int8"),
}


@pytest.mark.parametrize("name", ASKED)
def test_another_quantisation_than_the_files_is_refused(ours, name):
    asked, words = ASKED[name]
    message = rf"holds bert/\S+/kernel in nf4 in blocks of 64 with double quantisation, and {words} was asked for"
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(ours()), "masked-lm", quantization=asked)
    assert "\n" not in str(caught.value)


LAYER = "bert.encoder.layer.0.attention.self.query"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def without(name):
    return lambda file: file.pop(name)


def cut(name):
    return lambda file: file.update({name: file[name][:-1]})


def state(**changed):
    def change(file):
        values = {**json.loads(file[STATE].tobytes()), **changed}
        file[STATE] = np.frombuffer(json.dumps(values).encode(), np.uint8)

    return change


def to_embedding(file):
    name = "bert.embeddings.position_embeddings.weight"
    file |= stored_tensors(name, quantize(np.ones((40, 128), np.float32)))


SPOILT = {
    "no codes": (without(f"{LAYER}.weight"), rf"lack {LAYER}.weight, a part of a quantised weight"),
    "no scales": (without(f"{LAYER}.weight.absmax"), "stored as uint8 without the scales of a quantised weight"),
    "no state": (without(STATE), r"0 tensors quant_state\.bitsandbytes__"),
    "no nested scales": (without(f"{LAYER}.weight.nested_absmax"), rf"lack {LAYER}.weight.nested_absmax"),
    "codes cut off": (cut(f"{LAYER}.weight"), "8191 bytes for 16384 weights"),
    "scales cut off": (cut(f"{LAYER}.weight.absmax"), "255 scales for 256 blocks"),
    "nested scales cut off": (cut(f"{LAYER}.weight.nested_absmax"), "0 nested scales for 1 blocks"),
    "map cut off": (cut(f"{LAYER}.weight.quant_map"), "a quant_map that is not bitsandbytes'"),
    "state cut off": (cut(STATE), "a quant_state.bitsandbytes__nf4 that cannot be read"),
    "state of another shape": (state(shape=[64]), r"shape \[64\]"),
    "state of no shape": (state(shape=None), "that cannot be read"),
    "state of another type": (state(quant_type="fp4"), "quant_type fp4 in"),
    "state of another block size": (state(blocksize=32), "has blocks of 32 weights; those read are 64, 128"),
    "state without an offset": (state(nested_offset=None), "nested_offset None"),
    "state of other nested blocks": (state(nested_blocksize=128), "nested blocks of 128"),
    "state of another kernel": (
        state(shape=[64, 256]),
        r"has shape \(256, 64\), and the config asks for \(128, 128\)",
    ),
    "quantised embeddings": (
        to_embedding,
        "position_embeddings/embedding is stored in nf4, which is possible only for linear",
    ),
}


def spoilt(directory, copy, spoil):
    """A copy of the directory with its tensors changed."""
    from safetensors.numpy import save_file

    file = torch_side.tensors_of(directory, "model.safetensors")
    spoil(file)
    copy.mkdir(exist_ok=True)
    (copy / "config.json").write_text((directory / "config.json").read_text())
    save_file(file, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("name", SPOILT)
def test_malformed_files_are_refused(ours, tmp_path, name):
    spoil, message = SPOILT[name]
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(spoilt(ours(), tmp_path, spoil)), "masked-lm")
    assert "\n" not in str(caught.value)


INT8 = {
    "no scales": (without(f"{LAYER}.SCB"), "stored as int8 without the scales of a quantised weight"),
    "scales cut off": (cut(f"{LAYER}.SCB"), "127 scales for 128 channels"),
    "floats": (
        lambda file: file.update({f"{LAYER}.weight": np.ones((128, 128), np.float32)}),
        r"float32 \[128, 128\] beside int8 scales",
    ),
    "another layout": (
        lambda file: file.update({f"{LAYER}.weight_format": np.asarray(2, np.uint8)}),
        "weight_format 2; only 0, row-major",
    ),
}


@pytest.mark.parametrize("name", INT8)
def test_malformed_int8_files_are_refused(ours, tmp_path, name):
    spoil, message = INT8[name]
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(spoilt(ours(Quantization("int8")), tmp_path, spoil)), "masked-lm")
    assert "\n" not in str(caught.value)


def test_another_method_than_bitsandbytes_is_refused(ours, tmp_path):
    directory = spoilt(ours(), tmp_path, lambda file: None)
    config = torch_side.config_of(directory, "config.json")
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is quantised by 'gptq'; only bitsandbytes' 4-bit and int8"):
        load_model(str(directory), "masked-lm")


def test_a_quantised_model_is_not_quantised_again(ours, tmp_path):
    with pytest.raises(InputError, match=r"is quantised already, to nf4 in blocks of 64 .*full-precision model"):
        quantize_model(str(ours()), tmp_path / "again", Quantization("int8"))
    assert not (tmp_path / "again").exists()


def test_a_format_that_bitsandbytes_lacks_is_not_written(tmp_path):
    message = "a base in nf3 cannot be written to files: bitsandbytes has nf4, fp4, int8 only"
    with pytest.raises(InputError, match=message):
        quantize_model("./absent", tmp_path / "out", Quantization("nf3"))
    with pytest.raises(InputError, match=message):
        quantization_config(Quantization("nf3"), [])
    with pytest.raises(InputError, match=message):
        stored_tensors("x.weight", dataclasses.replace(quantize(np.ones((64, 2), np.float32)), data_type="nf3"))
    assert not (tmp_path / "out").exists()
