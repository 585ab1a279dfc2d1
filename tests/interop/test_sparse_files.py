"""Files of sparse updates: the indices on their way out and back, S²FT as a SHiRA that PEFT reads, and what is refused."""

import json

import chex
import jax
import numpy as np
import pytest
import tiny
import torch_side
from safetensors.numpy import save_file

from jaxpeft import BaseInfo, InputError, S2ft, Shira, SuperTuning, apply, load_adapter, merge, save_adapter
from jaxpeft.adapters.sparse_indices import places
from jaxpeft.models.build import Quantization
from jaxpeft.trees import CONSTANTS, constants_of

LAYER = "bert.encoder.layer.0.attention.self.query"
QUERY = LAYER.replace(".", "/")
BASE = BaseInfo("tiny", "BertForMaskedLM", "bert", None)
METHODS = {
    "random": Shira(rank=1, random_seed=4),
    "blocks": Shira(rank=1, mask_type="block"),
    "super": SuperTuning(sparsity=0.9),
    "unsaved": SuperTuning(sparsity=0.9, save_precomputed_indices=False),
    "supra": SuperTuning(sparsity=0.9, select_top=False, rank=2, alpha=3),
}


@pytest.fixture(name="bert")
def _bert(tiny_models):
    return tiny_models("bert", config={"num_hidden_layers": 1})


def written(directory, model, method, targets=("query",)):
    frozen, adapters = tiny.adapted(model, method, target_modules=list(targets))
    save_adapter(directory, adapters, method, base=BASE, frozen=frozen)
    return frozen, adapters


@pytest.mark.parametrize("name", METHODS)
def test_indices_come_back(name, bert, tmp_path):
    method = METHODS[name]
    frozen, adapters = written(tmp_path, bert, method, ("query", "intermediate.dense"))
    found, loaded, again = load_adapter(tmp_path, bert.params)
    assert again == method
    chex.assert_trees_all_equal(loaded, adapters)
    chex.assert_trees_all_equal(found[CONSTANTS], frozen[CONSTANTS])
    indices = [key for key in torch_side.tensors_of(tmp_path) if key.endswith("_indices")]
    assert len(indices) == (0 if name == "unsaved" else 2)


def test_shira_s_indices_are_rows_and_columns_of_torch_s_weight(bert, tmp_path):
    frozen, _ = written(tmp_path, bert, METHODS["random"])
    stored = torch_side.tensors_of(tmp_path)[f"base_model.model.{LAYER}.shira_indices"]
    assert (stored.dtype, stored.shape) == (np.int32, (2, 64))
    rows, columns = places(constants_of(frozen)[QUERY]["indices"], 32)
    np.testing.assert_array_equal(stored, [columns, rows])
    # On Windows PEFT writes them as float32.
    changed(tmp_path, {f"base_model.model.{LAYER}.shira_indices": stored.astype(np.float32)})
    found, _, _ = load_adapter(tmp_path, bert.params)
    chex.assert_trees_all_equal(found[CONSTANTS], frozen[CONSTANTS])


def test_s2ft_is_written_as_a_shira(bert, tmp_path):
    """Heads of 16 inputs and channels, in layers of several widths: one r holds them all, and zeros fill what is left over."""
    method = S2ft(channels=3, heads=1, head_dim=16, attention_modules=("attention.output.dense",))
    frozen, adapters = written(tmp_path, bert, method, ("output.dense",))
    ranks = {
        path: -(-site["delta"].size // (sum(kernel_shape(bert, path)))) for path, site in adapters["sites"].items()
    }
    assert sorted(ranks.values()) == [2, 8]
    config = torch_side.config_of(tmp_path)
    assert (config["peft_type"], config["r"], config["mask_type"]) == ("SHIRA", 8, "s2ft")
    found, loaded, again = load_adapter(tmp_path, bert.params)
    assert again == Shira(rank=8, mask_type="s2ft")
    for path, site in loaded["sites"].items():
        assert site["v"].size == 8 * sum(kernel_shape(bert, path))
        assert int((site["v"] != 0).sum()) == adapters["sites"][path]["delta"].size
    chex.assert_trees_all_equal(merge(found, loaded, again), merge(frozen, adapters, method))
    # What is written again is what was read.
    save_adapter(tmp_path / "again", loaded, again, base=BASE, frozen=found)
    chex.assert_trees_all_equal(torch_side.tensors_of(tmp_path / "again"), torch_side.tensors_of(tmp_path))


def test_a_layer_without_room_for_s2ft_s_zeros_is_refused(bert, tmp_path):
    """r is 16 for all inputs of the query layer, 32 to 32. The zeros of a layer that is as small need the same room."""
    whole = S2ft(channels=32)
    frozen, adapters = tiny.adapted(bert, whole, target_modules=["query"])
    save_adapter(tmp_path, adapters, whole, base=BASE, frozen=frozen)  # 16·(32 + 32) = 32·32: just enough
    frozen, adapters = tiny.adapted(bert, whole, target_modules=["query", "intermediate.dense"])
    with pytest.raises(InputError, match=r"PEFT.s file of an S²FT .* layer .*query .* merge"):
        save_adapter(tmp_path, adapters, whole, base=BASE, frozen=frozen)


def test_torch_peft_reads_an_s2ft(bases, tmp_path):
    base, model = bases("bert", "masked-lm")
    method = S2ft(channels=3, heads=1, head_dim=16, attention_modules=("attention.output.dense",))
    frozen, adapters = tiny.adapted(model, method, target_modules=["output.dense"])
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model), frozen=frozen)
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path)
    inputs = torch_side.batch("bert")
    ours = apply(model.module, frozen, adapters, method, **model.inputs(inputs)).logits
    np.testing.assert_allclose(ours, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-5)


def redrawn(frozen, seed=0):
    """Masks with other indices than `frozen` has, and `frozen` with them."""
    masks = {
        path: {"indices": jax.random.permutation(jax.random.key(seed), 32 * 32)[: own["indices"].size].astype(np.int32)}
        for path, own in constants_of(frozen).items()
    }
    return masks, {**frozen, CONSTANTS: masks}


@pytest.mark.parametrize("name", ["random", "supra"])
def test_a_file_has_the_indices_that_were_redrawn(name, bert, tmp_path):
    method = METHODS[name]
    frozen, adapters = tiny.adapted(bert, method, target_modules=["query"])
    masks, final = redrawn(frozen)
    save_adapter(tmp_path / "masks", adapters, method, base=BASE, frozen=frozen, masks=masks)
    save_adapter(tmp_path / "plain", adapters, method, base=BASE, frozen=final)
    chex.assert_trees_all_equal(torch_side.tensors_of(tmp_path / "masks"), torch_side.tensors_of(tmp_path / "plain"))
    found, loaded, again = load_adapter(tmp_path / "masks", bert.params)
    assert again == method
    chex.assert_trees_all_equal((found[CONSTANTS], loaded), (masks, adapters))
    inputs = bert.inputs(torch_side.batch("bert"))
    ours = apply(bert.module, frozen, adapters, method, masks=masks, **inputs).logits
    np.testing.assert_array_equal(apply(bert.module, found, loaded, again, **inputs).logits, ours)


def test_redrawn_indices_must_be_in_the_file(bert, tmp_path):
    frozen, adapters = tiny.adapted(bert, METHODS["unsaved"], target_modules=["query"])
    masks, _ = redrawn(frozen)
    with pytest.raises(InputError, match=r"indices of this supertuning were redrawn .* save_precomputed_indices true"):
        save_adapter(tmp_path, adapters, METHODS["unsaved"], base=BASE, frozen=frozen, masks=masks)


@pytest.mark.parametrize("name", ["random", "supra"])
def test_torch_peft_reads_redrawn_indices(name, bases, tmp_path):
    base, model = bases("bert", "masked-lm")
    method = METHODS[name]
    frozen, adapters = tiny.adapted(model, method, target_modules=["query", "value"])
    masks, _ = redrawn(frozen)
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(model), frozen=frozen, masks=masks)
    peft = torch_side.load_peft(torch_side.load_torch(base), tmp_path)
    inputs = torch_side.batch("bert")
    ours = apply(model.module, frozen, adapters, method, masks=masks, **model.inputs(inputs)).logits
    np.testing.assert_allclose(ours, torch_side.torch_logits(peft, inputs), rtol=0, atol=1e-5)


def test_a_file_needs_the_frozen_parameters(bert, tmp_path):
    _, adapters = tiny.adapted(bert, METHODS["super"], target_modules=["query"])
    with pytest.raises(InputError, match=r"SUPERTUNING keeps the indices of layer .*query with the frozen parameters"):
        save_adapter(tmp_path, adapters, METHODS["super"], base=BASE)


def test_weights_that_do_not_say_which_value_belongs_where(tiny_models, tmp_path):
    """Of a 4-bit base many weights are equal."""
    model = tiny_models("bert", config={"num_hidden_layers": 1}, quantization=Quantization())
    with pytest.raises(InputError, match="save the adapter with save_precomputed_indices true"):
        written(tmp_path, model, METHODS["unsaved"])
    frozen, _ = written(tmp_path, model, METHODS["super"])
    chex.assert_trees_all_equal(load_adapter(tmp_path, model.params)[0][CONSTANTS], frozen[CONSTANTS])


TENSOR = f"base_model.model.{LAYER}."
BROKEN = {
    "missing": (METHODS["random"], {TENSOR + "shira_indices": None}, "has no shira_indices; the file is incomplete"),
    "flat": (METHODS["random"], {TENSOR + "shira_indices": np.arange(64)}, r"have shape \(64,\); PEFT's are \[2, n\]"),
    "pairs": (
        METHODS["super"],
        {TENSOR + "supertuning_indices": np.ones((2, 9))},
        r"have shape \(2, 9\); PEFT's are \[n\]",
    ),
    "outside": (METHODS["random"], {TENSOR + "shira_indices": np.full((2, 64), 40)}, "name inputs outside 0 to 31"),
    "beyond": (METHODS["super"], {TENSOR + "supertuning_indices": np.arange(999, 1101)}, "has the index 1024, outside"),
    "twice": (METHODS["super"], {TENSOR + "supertuning_indices": np.zeros(102)}, "has the index 0 more than once"),
    "fewer": (
        METHODS["super"],
        {TENSOR + "supertuning_indices": np.arange(7)},
        r"supertuning_indices of layer .* \(7,\)",
    ),
    "values": (METHODS["random"], {TENSOR + "shira_weight": np.ones(3, np.float32)}, "shira_weight of layer .* shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name, bert, tmp_path):
    method, tensors, message = BROKEN[name]
    written(tmp_path, bert, method)
    changed(tmp_path, tensors)
    with pytest.raises(InputError, match=message):
        load_adapter(tmp_path, bert.params)


def test_entries_that_peft_s_users_chose(bert, tmp_path):
    """A mask_type that only its author knows: the file has the entries."""
    frozen, adapters = written(tmp_path, bert, METHODS["blocks"])
    config = torch_side.config_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "mask_type": "mine"}))
    found, loaded, method = load_adapter(tmp_path, bert.params)
    assert method == Shira(rank=1, mask_type="mine")
    chex.assert_trees_all_equal((found[CONSTANTS], loaded), (frozen[CONSTANTS], adapters))


def kernel_shape(model, path):
    for part in path.split("/"):
        model = model.params[part] if hasattr(model, "params") else model[part]
    return model["kernel"].shape


def changed(directory, tensors):
    """Write the file again with other `tensors`; None leaves one out."""
    found = {**torch_side.tensors_of(directory), **tensors}
    kept = {key: np.ascontiguousarray(tensor) for key, tensor in found.items() if tensor is not None}
    save_file(kept, directory / "adapter_model.safetensors", metadata={"format": "pt"})
