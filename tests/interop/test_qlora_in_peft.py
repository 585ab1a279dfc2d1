"""A QLoRA adapter of ours on bitsandbytes' 4-bit base in torch: PEFT loads it by its config, and the logits are the same."""

import bitsandbytes_side
import jax
import numpy as np
import pytest
import tiny
import torch_side
from trained import our_logits

from jaxpeft import BaseInfo, Lora, Quantization, load_model, quantize_model, save_adapter

CASES = {
    "nf4-double-masked-lm": (Quantization(), "masked-lm", ()),
    "fp4-classification-with-its-head": (
        Quantization("fp4", 64, False),
        "classification",
        ("classifier/kernel", "classifier/bias"),
    ),
}


@pytest.mark.parametrize("written_by", ["jaxpeft", "transformers"])
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_our_logits_on_the_4_bit_base(name, written_by, tmp_path):
    """Both hold equal 4-bit kernels and add in float32, in another order: 1.9e-6 of the largest logit apart at most."""
    bitsandbytes_side.required()
    quantization, task, head = CASES[name]
    full = torch_side.write_base(tmp_path / "full", "bert", task, layers=1, **bitsandbytes_side.WIDE["bert"])
    base = tmp_path / "base"
    if written_by == "jaxpeft":
        quantize_model(str(full), base, quantization)
    else:
        options = {"bnb_4bit_quant_type": quantization.data_type}
        options["bnb_4bit_use_double_quant"] = quantization.double_quantization
        bitsandbytes_side.write_quantized(full, base, task, load_in_4bit=True, **options)
    model = load_model(str(base), task, trained_leaves=lambda leaves, prefix: set(head))
    method = Lora(rank=4, alpha=8.0)
    frozen, adapters = tiny.adapted(model, method, fully_trained=head)
    adapters["modules"] = jax.tree.map(lambda leaf: leaf + 0.1, adapters["modules"])
    save_adapter(tmp_path / "adapter", adapters, method, base=BaseInfo.of(model))
    assert torch_side.config_of(tmp_path / "adapter")["base_model_name_or_path"] == str(base)

    in_torch = bitsandbytes_side.load(base, task)
    inputs = torch_side.batch("bert")
    plain = torch_side.torch_logits(in_torch, inputs)
    theirs = torch_side.torch_logits(torch_side.load_peft(in_torch, tmp_path / "adapter"), inputs)
    ours = our_logits(model, frozen=frozen, adapters=adapters, method=method, inputs=inputs)
    assert bitsandbytes_side.quantized_layers(in_torch)
    assert np.abs(ours - plain).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())
