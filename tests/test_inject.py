import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from jaxpeft.adapters import Lora, Site
from jaxpeft.adapters.build import init_adapters
from jaxpeft.errors import InputError
from jaxpeft.inject import apply, discover_sites
from jaxpeft.models.build import Quantization

NO_ADAPTERS = {"sites": {}, "modules": {}}
BERT_LAYER = {
    "attention/self/query": (32, 32),
    "attention/self/key": (32, 32),
    "attention/self/value": (32, 32),
    "attention/output/dense": (32, 32),
    "intermediate/dense": (32, 48),
    "output/dense": (48, 32),
}
DISTILBERT_LAYER = {
    **{f"attention/{name}": (32, 32) for name in ("q_lin", "k_lin", "v_lin", "out_lin")},
    "ffn/lin1": (32, 48),
    "ffn/lin2": (48, 32),
}
BERT = {f"encoder/layer/{i}/{name}": shape for i in range(2) for name, shape in BERT_LAYER.items()}
DISTILBERT = {f"transformer/layer/{i}/{name}": shape for i in range(2) for name, shape in DISTILBERT_LAYER.items()}
EMBEDDINGS = {"bert": {"token_type": (2, 32)}, "roberta": {"token_type": (1, 32)}}
HEADS = {
    ("bert", "masked-lm"): {"cls/predictions/transform/dense": (32, 32)},
    ("bert", "classification"): {"bert/pooler/dense": (32, 32), "classifier": (32, 3)},
    ("roberta", "masked-lm"): {"lm_head/dense": (32, 32)},
    ("roberta", "classification"): {"classifier/dense": (32, 32), "classifier/out_proj": (32, 3)},
    ("distilbert", "masked-lm"): {"vocab_transform": (32, 32)},
    ("distilbert", "classification"): {"pre_classifier": (32, 32), "classifier": (32, 3)},
}


@pytest.mark.parametrize(("kind", "task"), HEADS)
def test_sites_are_all_linear_layers_and_embeddings_but_a_tied_decoder(tiny_models, kind, task):
    model = tiny_models(kind, task, **({"num_labels": 3} if task == "classification" else {}))
    layers = DISTILBERT if kind == "distilbert" else BERT
    expected = {f"{kind}/{path}": shape for path, shape in layers.items()} | HEADS[kind, task]
    sites = model.sites()
    linear = {path: (site.d_in, site.d_out) for path, site in sites.items() if site.kind == "linear"}
    embeddings = {path: (site.d_in, site.d_out) for path, site in sites.items() if site.kind == "embedding"}
    assert linear == expected
    # A decoder is tied to the word embeddings: what it does is no call of theirs.
    shapes = {"word": (99, 32), "position": (40, 32)} | EMBEDDINGS.get(kind, {})
    assert embeddings == {f"{kind}/embeddings/{name}_embeddings": shape for name, shape in shapes.items()}
    assert all(path == site.path for path, site in sites.items())


def test_sites_of_shapes_and_of_a_4_bit_base_are_the_same(bert, tiny_models):
    shapes = jax.eval_shape(lambda: bert.params)
    inputs = bert.inputs(tiny.batch())
    assert discover_sites(bert.module, shapes, **inputs) == bert.sites()
    assert tiny_models("bert", quantization=Quantization()).sites() == bert.sites()


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(6, name="linear")(x)


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(4, name="linear")(x), None


class Scanned(nn.Module):
    shared: bool = False

    @nn.compact
    def __call__(self, x, deterministic=True):
        how = (
            {"variable_broadcast": "params", "split_rngs": {"params": False}}
            if self.shared
            else {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        )
        return nn.scan(Body, length=3, **how)(name="layers")(x, None)[0]


def test_a_model_scanned_over_its_layers_is_refused():
    x = jnp.ones((2, 4))
    params = Scanned().init(jax.random.key(0), x)["params"]
    with pytest.raises(InputError, match=r"layers/linear has a kernel of shape \(3, 4, 4\).*build it unscanned"):
        discover_sites(Scanned(), params, x=x)


def test_layers_that_share_their_weights_are_one_site():
    """ALBERT's way: one kernel, called once a layer; the path stands for it truly."""
    x = jnp.ones((2, 4))
    params = Scanned(shared=True).init(jax.random.key(0), x)["params"]
    assert discover_sites(Scanned(shared=True), params, x=x) == {"layers/linear": Site("layers/linear", 4, 4)}


def test_a_path_the_model_never_calls_is_refused(bert):
    frozen, adapters = tiny.adapted(bert, Lora(rank=2))
    query = "bert/encoder/layer/0/attention/self/query"
    adapters["sites"]["bert/encoder/layer/0/attention/self/quary"] = adapters["sites"].pop(query)
    run = jax.jit(lambda a: apply(bert.module, frozen, a, Lora(rank=2), **bert.inputs(tiny.batch())).logits)
    with pytest.raises(InputError, match=r"'bert/encoder/layer/0/attention/self/quary', which the model never calls"):
        run(adapters)


def test_each_site_starts_the_same_whatever_else_is_adapted(bert):
    _, both = tiny.adapted(bert, Lora(rank=2), target_modules=["query", "dense"], nonzero=False)
    _, one = tiny.adapted(bert, Lora(rank=2), target_modules=["query"], nonzero=False)
    for path, params in one["sites"].items():
        np.testing.assert_array_equal(params["a"], both["sites"][path]["a"])
    values = [site["a"] for site in both["sites"].values() if site["a"].shape == (32, 2)]
    assert len({value.tobytes() for value in map(np.asarray, values)}) == len(values)  # no two layers alike


def test_a_rank_wider_than_its_layer_is_refused(bert):
    with pytest.raises(InputError, match="rank 33 is outside 1 to 32, the width of layer bert/"):
        tiny.adapted(bert, Lora(rank=33))


def test_a_quantised_leaf_cannot_train_whole(tiny_models):
    model = tiny_models("bert", quantization=Quantization())
    with pytest.raises(InputError, match="kernel is stored quantised and cannot be fully trained"):
        tiny.adapted(model, None, fully_trained=["bert/encoder/layer/0/output/dense/kernel"])


def test_a_tap_sees_the_first_argument_of_its_module_and_no_other():
    x = jnp.arange(8.0).reshape(2, 4)
    params = Linear().init(jax.random.key(0), x)["params"]
    seen = apply(Linear(), params, NO_ADAPTERS, input_hooks={"linear": lambda x: x[:1]}, x=x)
    np.testing.assert_array_equal(seen, Linear().apply({"params": params}, x[:1]))


def test_a_whole_leaf_stands_in_for_the_base_s():
    x = jnp.arange(8.0).reshape(2, 4)
    params = Linear().init(jax.random.key(0), x)["params"]
    frozen, adapters = init_adapters(params, None, {}, rng=jax.random.key(0), fully_trained=["linear/bias"])
    assert set(frozen["linear"]) == {"kernel"}
    adapters["modules"]["linear"]["bias"] += 1
    expected = Linear().apply({"params": params}, x) + 1
    np.testing.assert_allclose(apply(Linear(), frozen, adapters, x=x), expected, rtol=1e-6)


def test_adapters_are_copies_that_a_step_may_consume(bert):
    leaf = "cls/predictions/bias"
    _, adapters = tiny.adapted(bert, None, fully_trained=[leaf])
    jax.tree.map(lambda array: array.delete(), adapters)
    assert np.isfinite(bert.params["cls"]["predictions"]["bias"]).all()
