"""Models in full precision and in 4 and 8 bits, each written once."""

import functools

import bitsandbytes_side
import pytest
import torch_side

from jaxpeft import Quantization, quantize_model

NF4 = Quantization()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A function `(model_type, task) → directory` of a full-precision model saved by torch."""
    pytest.importorskip("torch")

    @functools.cache
    def write(model_type="bert", task="masked-lm"):
        directory = tmp_path_factory.mktemp("base")
        return torch_side.write_base(directory, model_type, task, layers=1, **bitsandbytes_side.WIDE[model_type])

    return write


@pytest.fixture(scope="session")
def ours(base, tmp_path_factory):
    """A function `(quantization, model_type, task, asked) → directory` of what `quantize_model` made of `base`."""

    @functools.cache
    def write(quantization=NF4, model_type="bert", task="masked-lm", asked=None):
        directory = tmp_path_factory.mktemp("ours") / "model"
        quantize_model(str(base(model_type, task)), directory, quantization, task=asked)
        return directory

    return write


@pytest.fixture(scope="session")
def theirs(base, tmp_path_factory):
    """A function `(model_type, task, **options of BitsAndBytesConfig) → directory` that transformers quantised and saved."""
    bitsandbytes_side.required()

    @functools.cache
    def write(model_type="bert", task="masked-lm", **options):
        directory = tmp_path_factory.mktemp("theirs")
        return bitsandbytes_side.write_quantized(base(model_type, task), directory, task, **options)

    return write
