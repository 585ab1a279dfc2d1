"""Weights on disk in every form that is read, and every one that is refused."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch_side
from trained import our_logits

from jaxpeft import InputError, Quantization, load_model
from jaxpeft.models.inputs import max_tokens
from jaxpeft.quantization import is_quantized
from jaxpeft.trees import leaf_paths

NOTHING = {"adapters": {"sites": {}, "modules": {}}, "method": None}
BERT_HEAD = {"transform/dense/kernel", "transform/dense/bias", "transform/LayerNorm/scale", "transform/LayerNorm/bias"}
BERT_HEAD = {f"cls/predictions/{leaf}" for leaf in (*BERT_HEAD, "bias")}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A function `(model_type, task) → directory` of a model saved by torch, once a session."""
    made = {}

    def save(model_type, task="masked-lm"):
        if (model_type, task) not in made:
            made[model_type, task] = torch_side.write_base(tmp_path_factory.mktemp("saved"), model_type, task, layers=1)
        return made[model_type, task]

    return save


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of BERT's directory, to be changed."""
    return shutil.copytree(saved("bert"), tmp_path / "copied")


def logits(model, inputs):
    return our_logits(model, frozen=model.params, inputs=inputs, **NOTHING)


def rewrite(directory, change):
    """Apply `change` to the dictionary of the tensors in `directory`."""
    from safetensors.numpy import save_file

    tensors = torch_side.tensors_of(directory, "model.safetensors")
    save_file(change(tensors) or tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("task", ["masked-lm", "classification"])
@pytest.mark.parametrize("model_type", tiny.CONFIGS)
def test_safetensors_give_torchs_logits(model_type, task, saved):
    directory, inputs = saved(model_type, task), torch_side.batch(model_type)
    model = load_model(str(directory), task)
    assert model.missing == ()
    assert model.torch_class in torch_side.config_of(directory, "config.json")["architectures"]
    theirs = torch_side.torch_logits(torch_side.load_torch(directory, task), inputs)
    np.testing.assert_allclose(logits(model, inputs), theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_without_torch(saved, tmp_path):
    directory, inputs = saved("bert"), torch_side.batch("bert")
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = """
import sys
sys.modules["torch"] = None  # importing it fails, and transformers does not find it
import numpy as np, jaxpeft
from transformers.utils import is_torch_available
assert not is_torch_available()
model = jaxpeft.load_model(sys.argv[1], "masked-lm")
inputs = dict(np.load(sys.argv[2] + "/inputs.npz"))
out = jaxpeft.apply(model.module, model.params, {"sites": {}, "modules": {}}, **model.inputs(inputs)).logits
np.save(sys.argv[2] + "/logits.npy", out)
jaxpeft.save_model(sys.argv[2] + "/copy", model, model.params)
"""
    subprocess.run([sys.executable, "-c", code, str(directory), str(tmp_path)], check=True)
    model = load_model(str(directory), "masked-lm")
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), logits(model, inputs))
    theirs = torch_side.torch_logits(torch_side.load_torch(tmp_path / "copy"), inputs)
    np.testing.assert_allclose(logits(model, inputs), theirs, rtol=0, atol=1e-5)


def same_params(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare-base"])
def test_flax_msgpack(bare, saved, tmp_path):
    from flax.serialization import to_bytes

    whole = load_model(str(saved("bert")), "masked-lm")
    shutil.copy(saved("bert") / "config.json", tmp_path)
    params = whole.params["bert"] if bare else whole.params
    (tmp_path / "flax_model.msgpack").write_bytes(to_bytes(params))
    model = load_model(str(tmp_path), "masked-lm")
    assert set(model.missing) == (BERT_HEAD if bare else set())
    same_params(model.params["bert"], whole.params["bert"])


def test_sharded_safetensors(saved, tmp_path):
    whole = load_model(str(saved("bert")), "masked-lm")
    torch_side.load_torch(saved("bert")).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model = load_model(str(tmp_path), "masked-lm")
    assert model.missing == ()
    same_params(model.params, whole.params)


def test_bfloat16_safetensors(saved, tmp_path):
    import torch

    whole = load_model(str(saved("bert")), "masked-lm")
    torch_side.load_torch(saved("bert"), dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "masked-lm")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(model.params))
    same_params(model.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), whole.params))


def test_old_names_of_norms(copied):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors):
        return {
            f"{k.removesuffix(n)}{old.get(n, n)}": v for k, v in tensors.items() for n in [".".join(k.split(".")[-2:])]
        }

    whole = load_model(str(copied), "masked-lm")
    rewrite(copied, rename)
    assert any(key.endswith("gamma") for key in torch_side.tensors_of(copied, "model.safetensors"))
    model = load_model(str(copied), "masked-lm")
    assert model.missing == ()
    same_params(model.params, whole.params)


HEADS = {
    ("bert", "masked-lm"): BERT_HEAD,
    ("bert", "classification"): {"classifier/kernel", "classifier/bias"},
    ("distilbert", "masked-lm"): {
        *("vocab_transform/kernel", "vocab_transform/bias", "vocab_layer_norm/scale", "vocab_layer_norm/bias"),
        "vocab_projector/bias",
    },
    ("distilbert", "classification"): {
        *("pre_classifier/kernel", "pre_classifier/bias", "classifier/kernel", "classifier/bias")
    },
    ("roberta", "masked-lm"): {
        *("lm_head/dense/kernel", "lm_head/dense/bias", "lm_head/layer_norm/scale", "lm_head/layer_norm/bias"),
        "lm_head/bias",
    },
    ("roberta", "classification"): {
        *("classifier/dense/kernel", "classifier/dense/bias", "classifier/out_proj/kernel", "classifier/out_proj/bias"),
    },
}


@pytest.mark.parametrize(("model_type", "task"), HEADS)
def test_a_bare_base_lacks_its_head(model_type, task, saved):
    model = load_model(str(saved(model_type, "encoder")), task, num_labels=3 if task == "classification" else None)
    assert set(model.missing) == HEADS[model_type, task]
    base = torch_side.tensors_of(saved(model_type, "encoder"), "model.safetensors")
    embeddings = model.params[model_type]["embeddings"]["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(embeddings, base["embeddings.word_embeddings.weight"])
    if task == "classification":
        assert model.config.num_labels == 3


def test_a_new_head_is_the_seeds(saved):
    def kernel(seed):
        model = load_model(str(saved("bert", "encoder")), "masked-lm", seed=seed)
        return np.asarray(model.params["cls"]["predictions"]["transform"]["dense"]["kernel"])

    first = kernel(0)
    np.testing.assert_array_equal(first, kernel(0))
    assert np.abs(first - kernel(1)).max() > 0.01


def test_random_weights_from_a_config(tmp_path):
    values = {**tiny.CONFIGS["distilbert"], "n_layers": 1}
    (tmp_path / "small.json").write_text(json.dumps(values))
    model = load_model(str(tmp_path / "small.json"), "masked-lm", weights="random")
    assert model.missing == ()
    kernel = np.asarray(model.params["distilbert"]["transformer"]["layer"]["0"]["ffn"]["lin1"]["kernel"])
    assert 0.015 < kernel.std() < 0.025
    with pytest.raises(InputError, match=r"no weights in .*--model\.weights random"):
        load_model(str(tmp_path / "small.json"), "masked-lm")


def test_what_trains_stays_single_in_a_bfloat16_model(saved):
    with jax.numpy_dtype_promotion("standard"):  # Flax's own layers mix bf16 activations with fp32 parameters
        model = load_model(
            str(saved("bert")),
            "masked-lm",
            dtype="bfloat16",
            trained_leaves=lambda leaves, prefix: {leaf for leaf in leaves if not leaf.startswith(prefix + "/")},
        )
    for path, leaf in leaf_paths(model.params).items():
        frozen_matrix = path.startswith("bert/") and leaf.ndim > 1
        assert leaf.dtype == (jnp.bfloat16 if frozen_matrix else jnp.float32), path


def test_only_the_encoders_frozen_kernels_are_stored_in_4_bits(saved):
    model = load_model(
        str(saved("bert", "classification")),
        "classification",
        quantization=Quantization(),
        trained_leaves=lambda leaves, prefix: {leaf for leaf in leaves if "pooler" in leaf},
    )
    stored = {path for path, leaf in leaf_paths(model.params).items() if is_quantized(leaf)}
    assert len(stored) == 6
    assert all(path.startswith("bert/encoder/layer/") and path.endswith("/kernel") for path in stored)


def test_gradient_checkpointing_changes_nothing(saved):
    inputs = torch_side.batch("bert")
    plain = load_model(str(saved("bert")), "masked-lm")
    saving = load_model(str(saved("bert")), "masked-lm", gradient_checkpointing=True)
    same_params(plain.params, saving.params)
    np.testing.assert_allclose(logits(plain, inputs), logits(saving, inputs), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"gradient checkpointing: .*FlaxDistilBertForMaskedLM does not have it"):
        load_model(str(saved("distilbert")), "masked-lm", gradient_checkpointing=True)


def test_the_longest_row():
    from transformers import BertConfig, DistilBertConfig, RobertaConfig

    assert max_tokens(BertConfig()) == max_tokens(DistilBertConfig()) == 512
    assert max_tokens(RobertaConfig(max_position_embeddings=514)) == 512


def remove_weights(directory):
    (directory / "model.safetensors").unlink()


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def set_config(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write_index(directory):
    index = {"weight_map": {"bert.pooler.dense.weight": "model-00001-of-00001.safetensors"}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_msgpack(directory):
    (directory / "model.safetensors").unlink()
    (directory / "flax_model.msgpack").write_bytes(b"\xc1 no msgpack")


def bad_index(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text("{")


SPOILT = {
    "pickle": (pickled, r"pytorch_model\.bin is a pickle, .* safetensors"),
    "no-weights": (remove_weights, r"no weights in .*copied \(model\.safetensors or flax_model\.msgpack\)"),
    "no-config": (lambda d: (d / "config.json").unlink(), r"'.*copied' holds no config\.json"),
    "config-not-json": (lambda d: (d / "config.json").write_text("{"), r"config\.json"),
    "no-flax-class": (
        lambda d: set_config(d, model_type="deberta-v2"),
        "no Flax model of type 'deberta-v2' for masked-lm",
    ),
    "unknown-architecture": (
        lambda d: set_config(d, model_type="bird"),
        "names no architecture that transformers knows",
    ),
    "garbage": (lambda d: (d / "model.safetensors").write_bytes(b"garbage" * 99), "cannot be read as safetensors"),
    "cut-off": (
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]),
        "cannot be read as safetensors",
    ),
    "missing-shard": (write_index, r"model-00001-of-00001\.safetensors.* cannot be read"),
    "bad-index": (bad_index, r"index\.json is no index of safetensors"),
    "bad-msgpack": (bad_msgpack, r"flax_model\.msgpack cannot be read"),
    "another-architecture": (
        lambda d: rewrite(d, lambda tensors: {f"gpt.{key}": value for key, value in tensors.items()}),
        r"have no tensor of this model \(prefix 'bert'\)",
    ),
    "another-width": (
        lambda d: set_config(d, intermediate_size=40),
        r"layer/0/intermediate/dense/bias has shape \(48,\), and the config asks for \(40,\)",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_loaded_is_refused(name, copied):
    spoil, message = SPOILT[name]
    spoil(copied)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(copied), "masked-lm")
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_refused(saved):
    with pytest.raises(InputError, match="there is no task 'clasification'; did you mean 'classification'"):
        load_model(str(saved("bert")), "clasification")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("banana", {}, "there is no task 'banana'; choose from masked-lm, classification"),
        ("classification", {"num_labels": 0}, "num_labels is 0; it must be at least 1"),
        ("masked-lm", {"num_labels": 2}, "num_labels is 2, but masked-lm has no classes; leave it out"),
        ("masked-lm", {"dtype": "float64"}, "dtype is 'float64'; it must be one of float32, bfloat16"),
        ("masked-lm", {"dropout": 1.5}, "dropout is 1.5; it must be at least 0 and below 1, or None"),
        ("masked-lm", {"weights": "none"}, "weights is 'none'; it must be one of pretrained, random"),
    ],
)
def test_what_the_command_line_refuses_is_refused_before_a_file_is_read(task, options, message):
    with pytest.raises(InputError, match=message):
        load_model("owner/name-that-is-nowhere", task, **options)


@pytest.mark.parametrize(
    ("model_type", "new"),
    [
        ("bert", ["classifier/bias", "classifier/kernel"]),
        ("roberta", ["classifier/out_proj/bias", "classifier/out_proj/kernel"]),
    ],
)
def test_a_classifier_of_another_size_is_replaced(saved, model_type, new):
    model = load_model(str(saved(model_type, "classification")), "classification", num_labels=3)
    assert sorted(model.missing) == new
    assert model.other_classes == 2
    leaves = leaf_paths(model.params)
    assert [leaves[path].shape[-1] for path in new] == [3, 3]
    same = load_model(str(saved(model_type, "classification")), "classification", num_labels=2)
    assert (same.missing, same.other_classes) == ((), None)


def test_a_head_that_differs_in_another_axis_is_refused(saved, tmp_path):
    shutil.copytree(saved("bert", "classification"), tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps({**config, "hidden_size": 2 * config["hidden_size"]}))
    with pytest.raises(InputError, match=r"has shape .*, and the config asks for"):
        load_model(str(tmp_path / "wide"), "classification", num_labels=3)


@pytest.mark.parametrize(
    ("model_type", "rates"),
    [
        ("bert", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        ("roberta", ("hidden_dropout_prob", "attention_probs_dropout_prob")),
        ("distilbert", ("dropout", "attention_dropout")),
    ],
)
def test_dropout_of_the_base_is_set_in_the_module_and_not_in_what_is_saved(tiny_models, model_type, rates):
    model = tiny_models(model_type, dropout=0.0)
    assert [getattr(model.module.config, rate) for rate in rates] == [0.0, 0.0]
    assert [getattr(model.config, rate) for rate in rates] == [0.1, 0.1]
