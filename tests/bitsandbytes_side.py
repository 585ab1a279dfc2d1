"""Quantised models in torch: written and read by transformers through bitsandbytes. Imports them only when they are used."""

import pytest
import torch_side

_BERT = {"hidden_size": 128, "intermediate_size": 256}
WIDE = {"bert": _BERT, "roberta": _BERT, "distilbert": {"dim": 128, "hidden_dim": 256}}
"""Configs with whole blocks of 64 or 128 in every row: bitsandbytes 0.50.2 dequantises others wrongly on a CPU."""


def required():
    """Skip the test where torch or bitsandbytes are not installed."""
    pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")


def write_quantized(base, directory, task="masked-lm", **options):
    """Quantise the model in `base` as it is loaded, `BitsAndBytesConfig(**options)`, and save it by transformers."""
    import torch
    from transformers import BitsAndBytesConfig

    model = torch_side.load_torch(base, task, quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


def load(directory, task="masked-lm"):
    """The quantised torch model in `directory`; every parameter of it must be in the file, and nothing else."""
    import torch

    model, loading = torch_side.load_torch(directory, task, dtype=torch.float32, output_loading_info=True)
    assert loading["missing_keys"] == []
    assert loading["unexpected_keys"] == []
    return in_float32(model.eval())


def in_float32(model):
    """`model`, its 4-bit layers computing in float32: on CPUs with bf16 instructions bitsandbytes' own choice is bf16."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def with_float_activations(model):
    """`model`, its int8 layers replaced by float ones of the kernels they stand for: LLM.int8() rounds inputs to int8 too."""
    import bitsandbytes.functional as functional
    import torch

    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear8bitLt":
            plain = torch.nn.Linear(module.in_features, module.out_features)
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # moved by the first call
            plain.weight.data = functional.int8_vectorwise_dequant(module.weight.data, scales)
            plain.bias.data = module.bias.data
            model.set_submodule(name, plain)
    return model


def quantized_layers(model):
    """The names of the layers that bitsandbytes runs."""
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}
