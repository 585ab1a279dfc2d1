"""An adapter whose masks prune whole ranks is written as a smaller one, and torch PEFT computes the same with it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_side
from tiers import slow_but
from trained import our_logits

from jaxpeft import BaseInfo, load_adapter, save_adapter
from jaxpeft.adapters import Hira, Loha, Lokr, Lora

METHODS = {
    "lora": Lora(rank=4, alpha=6.0),
    "rslora": Lora(rank=4, alpha=6.0, use_rslora=True, rank_pattern={"value": 2}, alpha_pattern={"query": 3.0}),
    "dora": Lora(rank=4, use_dora=True),
    "orthogonal": Lora(rank=4, init_lora_weights="orthogonal"),
    "hira": Hira(rank=4),
    "loha": Loha(rank=4, alpha=6.0),
    "lokr": Lokr(rank=3, alpha=6.0),
    "lokr, W₁ decomposed": Lokr(rank=3, alpha=6.0, decompose_both=True, decompose_factor=8),
}


def masks_of(sites):
    """The first layer keeps three ranks, the second one, the third none, the others all."""
    masks = {}
    for path, kept in zip(sorted(sites), (3, 1, 0), strict=False):
        masks[path] = {
            name: jnp.broadcast_to(keep if name in ("a", "w1_b", "w2_b") else keep[:, None], leaf.shape)
            for name, leaf in sites[path].items()
            if leaf.ndim == 2
            for keep in [np.arange(min(leaf.shape)) >= min(leaf.shape) - kept]
        }
    return masks


@pytest.mark.parametrize("name", slow_but(METHODS, "lora", "hira"))
def test_peft_computes_the_same_with_fewer_ranks(name, bases, tmp_path):
    base, model = bases("bert", "masked-lm")
    method = METHODS[name]
    frozen, adapters = tiny.adapted(model, method, scale=0.05)
    masks = masks_of(adapters["sites"])
    for kind, given in (("dense", None), ("small", masks)):
        save_adapter(tmp_path / kind, adapters, method, base=BaseInfo.of(model), masks=given)
    inputs = torch_side.batch("bert")
    ours = our_logits(model, frozen=frozen, adapters=adapters, method=method, inputs=inputs, masks=masks)
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path / "small")
    again, loaded, loaded_method = load_adapter(tmp_path / "small", model.params)
    scale = np.abs(ours).max()
    np.testing.assert_allclose(
        our_logits(model, frozen=again, adapters=loaded, method=loaded_method, inputs=inputs),
        ours,
        rtol=0,
        atol=1e-6 * scale,
    )
    np.testing.assert_allclose(torch_side.torch_logits(peft, inputs), ours, rtol=0, atol=1e-6 * scale)
    assert np.abs(our_logits(model, frozen=frozen, adapters=adapters, method=method, inputs=inputs) - ours).max() > 1e-3
    size = {kind: sum(t.size for t in torch_side.tensors_of(tmp_path / kind).values()) for kind in ("dense", "small")}
    # PEFT builds every layer of HiRA with r, so the file is as large as its fullest layer.
    assert size["small"] == size["dense"] if name == "hira" else size["small"] < size["dense"]


@pytest.mark.parametrize("name", ["lora", "hira"])
def test_equal_ranks_need_no_patterns(name, bases, tmp_path):
    _, model = bases("bert", "masked-lm")
    method = METHODS[name]
    _, adapters = tiny.adapted(model, method)
    keep = np.array([True, False, False, True])
    masks = {
        path: {"a": jnp.broadcast_to(keep, (32, 4)), "b": jnp.broadcast_to(keep[:, None], (4, 32))}
        for path in adapters["sites"]
    }
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model), masks=masks)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})
    assert {min(tensor.shape) for tensor in torch_side.tensors_of(tmp_path).values()} == {2}
    if name == "lora":
        assert (config["lora_alpha"], config["alpha_pattern"]) == (3.0, {})


def test_the_first_pattern_wins_in_the_file_too(bases, tmp_path):
    """A config with its patterns sorted would give every value of layer 0 the alpha 2."""
    _, model = bases("bert", "masked-lm")
    method = Lora(rank=4, alpha_pattern={"query": 8.0, r"layer\.0\..*": 2.0})
    _, adapters = tiny.adapted(model, method)
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model))
    _, _, loaded = load_adapter(tmp_path, model.params)
    assert [loaded.at(path).alpha for path in sorted(adapters["sites"])] == [8.0, 2.0, 8.0, 8.0]
