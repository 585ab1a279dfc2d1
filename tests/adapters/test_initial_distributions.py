"""Fresh adapters are drawn from PEFT's distributions: mean, variance and bounds of 10⁵ draws and more, beside PEFT's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.adapters import METHODS, SharesFactors, Site
from jaxpeft.interop.peft import FORMATS

LAYER = "layer"
SQUARE, FLAT, WIDE = (1024, 1024), (768, 1024), (2, 200_000)  # d_in, d_out

# Our method → PEFT's config, options that both name alike, ours of another name, PEFT's, and the layer's axes.
TABLE = {
    "lora": ("lora", "LoraConfig", {}, {"rank": 512}, {"r": 512}, FLAT),
    "lora-gaussian": ("lora", "LoraConfig", {"init_lora_weights": "gaussian"}, {"rank": 512}, {"r": 512}, FLAT),
    "lora-orthogonal": ("lora", "LoraConfig", {"init_lora_weights": "orthogonal"}, {"rank": 512}, {"r": 512}, FLAT),
    "lora-random": ("lora", "LoraConfig", {"init_lora_weights": False}, {"rank": 512}, {"r": 512}, FLAT),
    "hira": ("hira", "HiraConfig", {}, {"rank": 512}, {"r": 512}, FLAT),
    "ia3": ("ia3", "IA3Config", {"feedforward_modules": []}, {}, {}, FLAT),
    "ia3-random": ("ia3", "IA3Config", {"feedforward_modules": [], "init_ia3_weights": False}, {}, {}, WIDE),
    "vera": ("vera", "VeraConfig", {"d_initial": 0.3}, {"rank": 512}, {"r": 512}, FLAT),
    "vera-random": ("vera", "VeraConfig", {"init_weights": False}, {"rank": 200_000}, {"r": 200_000}, (2, 2)),
    "loha": ("loha", "LoHaConfig", {}, {"rank": 512}, {"r": 512}, FLAT),
    "loha-random": ("loha", "LoHaConfig", {"init_weights": False}, {"rank": 512}, {"r": 512}, FLAT),
    "lokr-w2": ("lokr", "LoKrConfig", {"decompose_factor": 1}, {"rank": 512}, {"r": 512}, FLAT),
    "lokr-w2-ab": ("lokr", "LoKrConfig", {"decompose_factor": 1}, {"rank": 300}, {"r": 300}, FLAT),
    "lokr-w1": (
        "lokr",
        "LoKrConfig",
        {"decompose_factor": 1024, "init_weights": False},
        {"rank": 512},
        {"r": 512},
        SQUARE,
    ),
    "lokr-w1-ab": (
        "lokr",
        "LoKrConfig",
        {"decompose_factor": 1024, "decompose_both": True},
        {"rank": 300},
        {"r": 300},
        SQUARE,
    ),
    "lokr-w1-ab-random": (
        "lokr",
        "LoKrConfig",
        {"decompose_factor": 1024, "decompose_both": True, "init_weights": False},
        {"rank": 300},
        {"r": 300},
        SQUARE,
    ),
    "adalora": ("adalora", "AdaLoraConfig", {"init_r": 512, "total_step": 9}, {}, {}, FLAT),
    "adalora-random": (
        "adalora",
        "AdaLoraConfig",
        {"init_r": 512, "total_step": 9, "init_lora_weights": False},
        {},
        {},
        FLAT,
    ),
    "lokr-lycoris": (
        "lokr",
        "LoKrConfig",
        {"decompose_factor": 1, "init_weights": "lycoris"},
        {"rank": 300},
        {"r": 300},
        FLAT,
    ),
}


def peft_s(config, options, dims):
    """PEFT's key without the layer's name → its fresh tensor, in our layout."""
    import peft
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module(LAYER, torch.nn.Linear(*dims))
    adapted = peft.get_peft_model(model, getattr(peft, config)(**options, target_modules=[LAYER]))
    tensors = peft.get_peft_model_state_dict(adapted)
    return {key.removeprefix(f"base_model.model.{LAYER}."): tensor.numpy().T for key, tensor in tensors.items()}


def ours(method, dims):
    site = Site(LAYER, *dims)
    params = method.init(jax.random.key(0), site, lambda: jnp.zeros(dims))
    form = FORMATS[method.name]()
    names = {name: key for key, name in {**form.keys, **form.shared_keys}.items()}
    shared = method.init_shared(jax.random.key(0), {LAYER: site}) if isinstance(method, SharesFactors) else {}
    return {names[name]: np.asarray(leaf) for name, leaf in {**params, **shared}.items()}


@pytest.mark.parametrize("name", TABLE)
def test_fresh_values_are_drawn_as_peft_draws_them(name):
    """To 1 %: of 3·10⁵ uniform draws the variance is uncertain by 0.16 %, of normal ones by 0.26 %."""
    kind, config, options, own, theirs, dims = TABLE[name]
    expected = peft_s(config, {**options, **theirs}, dims)
    actual = ours(METHODS[kind](**options, **own), dims)
    assert {key: tensor.shape for key, tensor in actual.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    compared = 0
    for key, tensor in expected.items():
        mine, tensor = actual[key].astype(np.float64), tensor.astype(np.float64)
        size = np.sqrt(np.square(tensor).mean())
        if tensor.size < 10**5 and (tensor.std() > 0 or tensor.size == 1):  # too few to say more than that it is drawn
            assert mine.size == 1 or mine.std() > 0, key
            continue
        compared += 1
        assert abs(mine.mean() - tensor.mean()) <= 0.01 * size, key
        assert abs(mine.var() - tensor.var()) <= 0.01 * tensor.var(), key
        if np.abs(tensor).max() < 2 * size:  # bounded: a constant, or uniform, whose bound is √3 of its deviation
            assert abs(np.abs(mine).max() - np.abs(tensor).max()) <= 0.01 * size, key
    assert compared
