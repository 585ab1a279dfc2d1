"""The encoder alone, without a head: read from any checkpoint, quantised, and measured as a part of a masked language model."""

from types import SimpleNamespace

import chex
import numpy as np
import pytest
import tiny
from flax import serialization
from safetensors.numpy import load_file, save_file

from jaxpeft.adapters import Lora, Shira
from jaxpeft.comparison.forgetting import _with_encoder
from jaxpeft.errors import InputError
from jaxpeft.interop.quantize import quantize_model
from jaxpeft.interop.transformers_files import save_model
from jaxpeft.merging import merge
from jaxpeft.models.build import Quantization, load_model
from jaxpeft.quantization import is_quantized
from jaxpeft.tasks import task_for
from jaxpeft.training.objective import Objective
from jaxpeft.trees import CONSTANTS, below, leaf_paths, nest, under

TASK, MASKED = "sentence-embeddings", task_for("masked-lm")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same encoder in the files of a bare BERT (with a pooler), and of a masked language model, of torch and of Flax."""
    root = tmp_path_factory.mktemp("checkpoints")
    bare = tiny.random_encoder(root / "bare")
    masked = root / "masked"
    masked.mkdir()
    tensors = load_file(bare / "model.safetensors")
    save_file({f"bert.{name}": tensor for name, tensor in tensors.items()}, masked / "model.safetensors")
    (masked / "config.json").write_text((bare / "config.json").read_text())
    found = {"bare": bare, "masked": masked}
    for name in ("bare", "masked"):
        flax = root / f"flax-{name}"
        flax.mkdir()
        leaves = leaf_paths(load_model(str(bare), TASK).params)
        tree = nest(
            {below("bert" if name == "masked" else "", path): np.asarray(leaf) for path, leaf in leaves.items()}
        )
        (flax / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
        (flax / "config.json").write_text((bare / "config.json").read_text())
        found[f"flax-{name}"] = flax
    return found


@pytest.mark.parametrize("name", ["bare", "masked", "flax-bare", "flax-masked"])
def test_any_checkpoint_has_the_encoder(places, name):
    expected = leaf_paths(load_model(str(places["bare"]), "masked-lm").params)
    model = load_model(str(places[name]), TASK)
    assert model.missing == ()
    for path, leaf in leaf_paths(model.params).items():
        np.testing.assert_array_equal(leaf, expected[f"bert/{path}"])
    assert not [path for path in leaf_paths(model.params) if "pooler" in path]


def test_decoders_and_unknown_tasks_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        InputError, match="no Flax model of type 'gpt2' for sentence-embeddings; it has albert, bart, bert"
    ):
        load_model(str(tmp_path / "config.json"), TASK, weights="random")
    with pytest.raises(InputError, match="num_labels is 2, but sentence-embeddings has no classes; leave it out"):
        load_model(str(tmp_path), TASK, num_labels=2)


@pytest.mark.parametrize("task", [None, TASK])
@pytest.mark.parametrize("name", ["bare", "masked"])
def test_a_quantised_checkpoint_is_what_the_flag_makes(places, name, task, tmp_path):
    quantize_model(str(places[name]), tmp_path / "nf4", Quantization(), task=task)
    expected = load_model(str(places["bare"]), TASK, quantization=Quantization())
    found = load_model(str(tmp_path / "nf4"), TASK)
    assert sum(map(is_quantized, leaf_paths(found.params).values())) == 12
    chex.assert_trees_all_equal(found.params, expected.params)
    assert not [key for key in load_file(tmp_path / "nf4" / "model.safetensors") if key.startswith("bert.")]


def test_a_quantised_model_is_written_with_its_names(places, tmp_path):
    model = load_model(str(places["masked"]), TASK, quantization=Quantization())
    save_model(tmp_path / "written", model, model.params)
    again = load_model(str(tmp_path / "written"), TASK)
    chex.assert_trees_all_equal(again.params, model.params)
    assert again.config.architectures == ["BertModel"]


@pytest.mark.parametrize("method", [Lora(rank=4), Shira(rank=2)])
def test_forgetting_is_measured_with_the_encoder_of_a_run_without_a_head(places, method):
    """The encoder and its adapters are found below the masked language model's own name for it."""
    whole, bare = (load_model(str(places["bare"]), task) for task in ("masked-lm", TASK))
    frozen, adapters = tiny.adapted(bare, method, fully_trained={"embeddings/LayerNorm/bias"})
    (bias,) = adapters["modules"]["embeddings/LayerNorm"].values()
    adapters["modules"]["embeddings/LayerNorm"]["bias"] = bias + 1
    run = SimpleNamespace(objective=Objective(bare, method, task_for(TASK)), frozen=frozen, adapters=adapters)
    frozen, moved = _with_encoder(run, whole, leaf_paths(whole.params))
    assert moved["sites"].keys() == {f"bert/{path}" for path in adapters["sites"]}
    assert set(frozen.get(CONSTANTS, {})) == (set(moved["sites"]) if isinstance(method, Shira) else set())
    # The encoder's own weights with the update in them, in a masked language model that adapts nothing.
    merged = {below("bert", path): leaf for path, leaf in leaf_paths(merge(run.frozen, adapters, method)).items()}
    batch, nothing = tiny.batch(), {"sites": {}, "modules": {}}
    expected = Objective(whole, None, MASKED).logits(nest(leaf_paths(whole.params) | merged), nothing, {}, batch)
    found = Objective(whole, method, MASKED).logits(frozen, moved, {}, batch)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    before = Objective(whole, None, MASKED).logits(whole.params, nothing, {}, batch)
    assert float(np.abs(found - before).max()) > 0.1


def test_paths_below_no_prefix():
    assert (below("", "a/b"), below("bert", "a/b")) == ("a/b", "bert/a/b")
    assert under("a/b", [""])
    assert under("bert/a", ["bert"])
    assert not under("berta/a", ["bert"])
