"""The rungs of the ladder that depend on the model, on BERT, DistilBERT and RoBERTa."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiers import slow, slow_but

from jaxpeft.adapters import Hira, Lora
from jaxpeft.inject import apply
from jaxpeft.merging import merge
from jaxpeft.models.build import Quantization

LORA, HIRA = Lora(rank=4, alpha=6.0), Hira(rank=4)
NF4 = {"quantization": Quantization()}
NO_ADAPTERS: dict = {"sites": {}, "modules": {}}
CASES = {
    "bert-lora-masked": ("bert", {}, LORA, "query|dense", True),
    "distilbert-hira-nf4": ("distilbert", NF4, HIRA, "q_lin|lin1|vocab_transform", False),
    "roberta-hira-masked": ("roberta", {}, HIRA, "key|dense", True),
}


@pytest.fixture(params=slow_but(CASES, "distilbert-hira-nf4"))
def case(request, tiny_models):
    kind, options, method, targets, masked = CASES[request.param]
    model = tiny_models(kind, **options)
    frozen, silent = tiny.adapted(model, method, target_modules=targets.split("|"), nonzero=False)
    _, adapters = tiny.adapted(model, method, target_modules=targets.split("|"), scale=0.5)
    return model, method, frozen, silent, adapters, tiny.half_masks(adapters) if masked else None


def assert_close(actual, expected):
    """To 1e-4 of the largest value: two layers and a head deep."""
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    chex.assert_trees_all_close(actual, expected, rtol=0, atol=1e-4 * scale)


def test_start_side_path_and_gradients(case):
    model, method, frozen, silent, adapters, masks = case
    inputs = model.inputs(tiny.batch(2))

    def side(a):
        return apply(model.module, frozen, a, method, masks=masks, **inputs).logits

    def plain(params):
        return model.module.apply({"params": params}, **inputs).logits

    base = plain(merge(model.params, NO_ADAPTERS))
    np.testing.assert_array_equal(side(silent), base)
    weight = jnp.asarray(tiny.normal(5, *base.shape))
    loss, gradients = jax.jit(jax.value_and_grad(lambda a: (side(a) * weight).sum()))(adapters)
    oracle, expected = jax.jit(
        jax.value_and_grad(lambda a: (plain(tiny.merge_pure(frozen, a, method, masks)) * weight).sum())
    )(adapters)
    assert_close(gradients, expected)
    assert_close(loss, oracle)
    out = side(adapters)
    assert jnp.abs(out - base).max() > 0.05 * jnp.abs(out).max()
    assert_close(out, plain(merge(frozen, adapters, method, masks=masks)))


@pytest.mark.usefixtures("standard_promotion")
def test_a_bf16_model_stays_bf16_and_equals_the_merged_one(tiny_models):
    """To 8 u of the largest logit: u = 2⁻⁸ is a rounding, and some fifty of them in a row sum to √50·u = 7 u."""
    model = tiny_models("roberta", dtype="bfloat16")
    inputs = model.inputs(tiny.batch(2))
    frozen, adapters = tiny.adapted(model, LORA, scale=0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}

    @jax.jit
    def run(params, frozen, adapters):
        side = apply(model.module, frozen, adapters, LORA, **inputs).logits
        return side, model.module.apply({"params": params}, **inputs).logits

    side, merged = run(merge(frozen, adapters, LORA), frozen, adapters)
    assert side.dtype == merged.dtype == jnp.bfloat16
    chex.assert_trees_all_close(
        side.astype(jnp.float32), merged.astype(jnp.float32), rtol=0, atol=8 * 2**-8 * jnp.abs(merged).max().item()
    )


@pytest.mark.parametrize("method", [Lora(rank=4, dropout=0.5), Hira(rank=4, dropout=0.5)], ids=["lora", "hira"])
@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_the_base_s_dropout_is_what_it_was_without_adapters(tiny_models, kind, method):
    model, rng = tiny_models(kind), jax.random.key(3)
    inputs = model.inputs(tiny.batch(2))
    base = model.module.apply({"params": model.params}, rngs={"dropout": rng}, deterministic=False, **inputs).logits
    frozen, adapters = tiny.adapted(model, method, nonzero=False)
    adapted = apply(model.module, frozen, adapters, method, dropout_rng=rng, **inputs).logits
    np.testing.assert_array_equal(adapted, base)


@pytest.mark.parametrize("options", [pytest.param({}, id="fp32"), pytest.param(NF4, marks=slow, id="nf4")])
def test_gradient_checkpointing_changes_nothing_and_drops_the_same_units(tiny_models, options):
    options = {"config": {"num_hidden_layers": 1}, **options}
    plain, remat = tiny_models("bert", **options), tiny_models("bert", gradient_checkpointing=True, **options)
    method = Lora(rank=4, dropout=0.3)
    frozen, adapters = tiny.adapted(plain, method, target_modules=["query", "dense"])
    chex.assert_trees_all_equal(frozen, tiny.adapted(remat, method)[0])
    assert remat.sites() == plain.sites()

    def run(model):
        def loss(a):
            rng = jax.random.key(0)
            return apply(model.module, frozen, a, method, dropout_rng=rng, **model.inputs(tiny.batch(2))).logits.std()

        return jax.jit(jax.value_and_grad(loss))(adapters)

    chex.assert_trees_all_close(run(remat), run(plain), rtol=1e-5, atol=1e-6)
