"""Adapters made by torch PEFT, loaded here: what is odd, old or spoilt (parity: test_parity.py)."""

import json
import shutil

import numpy as np
import pytest
import torch_side
from trained import our_logits

from jaxpeft import InputError, load_adapter

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "init_lora_weights": False}


def write_adapter(directory, base, task, values):
    """An adapter of torch PEFT whose every tensor is random; its logits."""
    import torch
    from peft import HiraConfig, LoraConfig, get_peft_model

    values = dict(values)
    kind = {"LORA": LoraConfig, "HIRA": HiraConfig}[values.pop("peft_type")]
    torch.manual_seed(3)
    model = get_peft_model(torch_side.load_torch(base, task), kind(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                assert "embedding" not in name
    model.save_pretrained(directory)
    return model


@pytest.fixture
def lora(bases, tmp_path):
    """The directory of a good LoRA for BERT, to be spoilt, and its model."""
    base, model = bases("bert", "masked-lm")
    write_adapter(tmp_path / "lora", base, "masked-lm", {**LORA, "target_modules": ["query"]})
    return tmp_path / "lora", model


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(("model_type", "head"), [("bert", "cls"), ("roberta", "lm_head")])
def test_a_whole_head_loads_if_its_decoder_is_still_tied(model_type, head, bases, tmp_path):
    from safetensors.numpy import save_file

    base, model = bases(model_type, "masked-lm")
    values = {**LORA, "target_modules": ["query"], "modules_to_save": [head]}
    peft = write_adapter(tmp_path, base, "masked-lm", values)
    with pytest.raises(InputError, match=r"decoder\.weight' was trained apart from the word embeddings"):
        load_adapter(tmp_path, model.params)

    # As PEFT writes it where the decoder did not train.
    tensors = torch_side.tensors_of(tmp_path)
    decoder = next(key for key in tensors if key.endswith("decoder.weight"))
    tensors[decoder] = np.asarray(model.params[model_type]["embeddings"]["word_embeddings"]["embedding"])
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    frozen, adapters, method = load_adapter(tmp_path, model.params)
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path)
    inputs = torch_side.batch(model_type)
    ours = our_logits(model, frozen=frozen, adapters=adapters, method=method, inputs=inputs)
    np.testing.assert_allclose(ours, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-5)


def test_a_half_precision_file_is_read_in_single(lora):
    import torch
    from safetensors.torch import load_file, save_file

    directory, model = lora
    file = directory / "adapter_model.safetensors"
    exact = torch_side.tensors_of(directory)
    save_file({key: tensor.to(torch.bfloat16) for key, tensor in load_file(file).items()}, file)
    _, adapters, _ = load_adapter(directory, model.params)
    a = adapters["sites"]["bert/encoder/layer/0/attention/self/query"]["a"]
    assert a.dtype == np.float32
    np.testing.assert_allclose(
        a.T, exact["base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"], rtol=2**-8
    )


def change_config(directory, **values):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_tensors(directory, change):
    from safetensors.numpy import save_file

    tensors = torch_side.tensors_of(directory)
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


FIRST = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def pickle_only(directory):
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


SPOILT = {
    "pickle": (pickle_only, r"adapter_model\.bin is a pickle.*save_pretrained"),
    "no-weights": (lambda d: (d / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors in '.*lora'"),
    "no-config": (lambda d: (d / "adapter_config.json").unlink(), r"no adapter_config\.json in '.*lora'"),
    "no-directory": (shutil.rmtree, r"no adapter_config\.json in '.*lora'"),
    "not-json": (lambda d: (d / "adapter_config.json").write_text("{r: 4"), "is not JSON"),
    "not-text": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe\x00"), "is not JSON"),
    "not-an-object": (lambda d: (d / "adapter_config.json").write_text("[1]"), r"peft_type \[1\] is not supported"),
    "garbage": (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x93garbage" * 9), "cannot be read"),
    "empty": (lambda d: (d / "adapter_model.safetensors").write_bytes(b""), "cannot be read"),
    "unknown-type": (lambda d: change_config(d, peft_type="BOFT"), "'BOFT' is not supported; known: LORA, HIRA"),
    "qalora": (lambda d: change_config(d, use_qalora=True), "use_qalora=True is not supported"),
    "dora-without-magnitude": (lambda d: change_config(d, use_dora=True), "query has no lora_magnitude_vector"),
    "other-rank": (lambda d: change_config(d, r=8), r"query has shape \(4, 32\), .* ask for \(8, 32\)"),
    "width": (lambda d: change_tensors(d, lambda t: t.update({FIRST: np.ones((4, 48), np.float32)})), "another base"),
    "axes": (lambda d: change_tensors(d, lambda t: t.update({FIRST: np.ones(4, np.float32)})), "another base"),
    "half": (lambda d: change_tensors(d, lambda t: t.pop(FIRST)), "query has no lora_A.weight; the file is incomplete"),
    "unknown-key": (
        lambda d: change_tensors(d, lambda t: t.update({FIRST.replace("layer.0", "layer.7"): t.pop(FIRST)})),
        r"'bert\.encoder\.layer\.7\..*' belongs to no layer",
    ),
    "module-of-another-shape": (
        lambda d: change_tensors(d, lambda t: t.update({"base_model.model.cls.predictions.bias": np.ones(5, "f4")})),
        r"'cls\.predictions\.bias' has shape \(5,\), the model's \(99,\)",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_loaded_is_refused(name, lora):
    directory, model = lora
    spoil, message = SPOILT[name]
    spoil(directory)
    with pytest.raises(InputError, match=message) as caught:
        load_adapter(directory, model.params)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(lora, tiny_models):
    directory, _ = lora
    with pytest.raises(InputError, match="another base"):
        load_adapter(directory, tiny_models("bert", config={"hidden_size": 16}).params)
    with pytest.raises(InputError, match="belongs to no layer of this model"):
        load_adapter(directory, tiny_models("distilbert").params)
