"""The initial values are PEFT's: A uniform on ±1/√d_in, B zero, both fp32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import (
    METHODS,
    AdaLora,
    FrozenLayer,
    Hira,
    Lokr,
    Lora,
    S2ft,
    Shira,
    Site,
    SiteMethod,
    SuperTuning,
    dora,
)
from jaxpeft.adapters.base import dropout
from jaxpeft.errors import InputError


@pytest.mark.parametrize("method", [Lora(rank=64), Hira(rank=64)])
@pytest.mark.parametrize("dims", [(256, 512), (1024, 96)])
def test_a_is_uniform_and_b_is_zero(method, dims):
    site = Site("layer", *dims)
    params = method.init(jax.random.key(0), site, kernel=lambda: pytest.fail("not needed"))
    chex.assert_shape([params["a"], params["b"]], [(site.d_in, 64), (64, site.d_out)])
    chex.assert_type([params["a"], params["b"]], jnp.float32)
    assert not params["b"].any()
    a, bound = np.asarray(params["a"], np.float64), site.d_in**-0.5
    assert -bound <= a.min() < -0.999 * bound
    assert 0.999 * bound < a.max() <= bound
    # Of n uniform values the mean has sd bound·√(1/3n), the variance bound²·√(4/45n): five of each.
    assert abs(a.mean()) < 5 * bound / np.sqrt(3 * a.size)
    assert abs(a.var() - bound**2 / 3) < 5 * bound**2 * np.sqrt(4 / 45 / a.size)


def test_scaling_is_alpha_over_rank():
    assert Lora(rank=8, alpha=16).scaling == 2
    assert Lora().scaling == 1
    assert Lora(rank=16, alpha=16, use_rslora=True).scaling == 4
    assert not hasattr(Hira(), "scaling")


def test_which_biases_of_the_base_train():
    leaves = ["query/kernel", "query/bias", "value/bias", "norm/bias", "norm/scale"]
    for kind in (Lora, AdaLora):
        assert kind().fully_trained(leaves, ["query"]) == set()
        assert kind(bias="all").fully_trained(leaves, ["query"]) == {"query/bias", "value/bias", "norm/bias"}
        assert kind(bias="lora_only").fully_trained(leaves, ["query"]) == {"query/bias"}


def test_lora_bias_is_refused_where_peft_refuses_it():
    with pytest.raises(InputError, match="lora_bias and use_dora exclude each other"):
        Lora(lora_bias=True, use_dora=True)
    words = Site("embeddings/word_embeddings", 99, 32, "embedding")
    with pytest.raises(InputError, match="lora_bias has no place at the embedding"):
        Lora(lora_bias=True).init(jax.random.key(0), words, lambda: jnp.zeros((99, 32)))


def test_a_small_hira_is_not_rounded_away_in_bf16():
    """W₀ = 1 and x = (1, −1): the base gives 0, and A·B = (2⁻¹⁰, 0) gives 2⁻¹⁰, though 1 + 2⁻¹⁰ is 1 in bf16."""
    kernel = jnp.ones((2, 1), jnp.bfloat16)
    layer = FrozenLayer(lambda x: x @ kernel, kernel.astype, None, jnp.bfloat16)
    params = {"a": jnp.array([[2.0**-5], [0.0]]), "b": jnp.array([[2.0**-5]])}
    out = Hira(rank=1).forward(jnp.array([[1.0, -1.0]], jnp.bfloat16), params, layer, None)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 0]) == 2.0**-10


def test_patterns_give_layers_their_own_rank_and_alpha():
    method = Lora(rank=8, alpha=16, rank_pattern={"query": 2}, alpha_pattern={r"layer\.1\..*": 4})
    assert (method.at("layer/0/query").rank, method.at("layer/0/query").scaling) == (2, 8)
    assert (method.at("layer/1/value").rank, method.at("layer/1/value").scaling) == (8, 0.5)
    assert method.at("layer/0/value") == method
    assert Hira(rank=8, rank_pattern={"query": 2}).at("layer/0/query").rank == 2


def test_dora_by_hand():
    """W₀ + A·B = [[3, 1], [4, 0]] has columns of length 5 and 1; m makes them 10 and 3."""
    w, params = jnp.array([[1.0, 0.0], [0.0, -2.0]]), {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[2.0, 1.0]])}
    method = Lora(rank=1, alpha=1, use_dora=True)
    params["m"] = jnp.array([10.0, 3.0])
    np.testing.assert_allclose(dora.column_norms(w, params, 1.0), [5, 1], rtol=1e-6)
    np.testing.assert_allclose(method.kernel(w, params), [[6, 3], [8, 0]], rtol=1e-6)
    fresh = method.init(jax.random.key(0), Site("layer", 2, 2), lambda: w)
    np.testing.assert_allclose(fresh["m"], [1, 2], rtol=1e-6)


def test_dora_s_dropout_falls_on_the_adapter_s_input_alone():
    """y = x·W₀ + bias + (m/n − 1)·x_d·W₀ + (m/n)·s·x_d·A·B."""
    rng, w = jax.random.key(3), jnp.asarray(tiny.normal(0, 5, 7))
    method = Lora(rank=2, alpha=6, use_dora=True, dropout=0.5)
    params = {"a": jnp.asarray(tiny.normal(1, 5, 2)), "b": jnp.asarray(tiny.normal(2, 2, 7)), "m": jnp.arange(1.0, 8)}
    x, bias = jnp.asarray(tiny.normal(3, 8, 5)), jnp.arange(7.0)
    layer = FrozenLayer(lambda x: x @ w + bias, w.astype, bias, jnp.float32)
    expected = x @ w + bias + dropout(x, 0.5, rng) @ (method.kernel(w, params) - w)
    np.testing.assert_allclose(method.forward(x, params, layer, rng), expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_s_hira_is_the_table_s():
    table, ids = jnp.asarray(tiny.normal(0, 9, 4)), jnp.array([[8, 0, 3], [3, 3, 1]])
    method = Hira(rank=2)
    params = {"a": jnp.asarray(tiny.normal(1, 9, 2)), "b": jnp.asarray(tiny.normal(2, 2, 4))}
    layer = FrozenLayer(lambda ids: table[ids], table.astype, None, jnp.float32, is_embedding=True)
    np.testing.assert_allclose(method.forward(ids, params, layer, None), method.kernel(table, params)[ids], rtol=1e-5)


def test_dora_s_norm_is_computed_without_a_full_product():
    """No value of the traced norm has as many entries as the kernel, but its own square."""
    rank, d_in, d_out = 4, 64, 96
    w, a, b = jnp.ones((d_in, d_out)), jnp.ones((d_in, rank)), jnp.ones((rank, d_out))
    jaxpr = jax.make_jaxpr(lambda w, a, b: dora.column_norms(w, {"a": a, "b": b}, 2.0))(w, a, b)
    products = [v.aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general" for v in e.outvars]
    assert sorted(products) == [(rank, rank), (rank, d_out), (rank, d_out)]
    exact = np.linalg.norm(np.ones((d_in, d_out)) + 2.0 * np.full((d_in, d_out), rank), axis=0)
    np.testing.assert_allclose(dora.column_norms(w, {"a": a, "b": b}, 2.0), exact, rtol=1e-6)


def test_the_meaning_of_each_method_by_hand():
    """W₀ = [[1, 2], [3, 4]], A·B = [[5, 10], [6, 12]]."""
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    params = {"a": jnp.array([[5.0], [6.0]]), "b": jnp.array([[1.0, 2.0]])}
    lora, hira = Lora(rank=1, alpha=0.5).kernel(w, params), Hira(rank=1).kernel(w, params)
    np.testing.assert_array_equal(lora, [[3.5, 7], [6, 10]])
    np.testing.assert_array_equal(hira, [[1 * 6, 2 * 11], [3 * 7, 4 * 13]])


def test_hira_without_a_product_of_full_rank_is_not_hira():
    """What the name promises: the update of rank-1 factors has full rank, LoRA's has rank 1."""
    w = jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)
    params = {"a": jnp.arange(1.0, 9)[:, None] / 8, "b": jnp.arange(1.0, 9)[None] / 8}
    assert np.linalg.matrix_rank(np.asarray(Hira(rank=1).kernel(w, params) - w), tol=1e-4) == 8
    assert np.linalg.matrix_rank(np.asarray(Lora(rank=1).kernel(w, params) - w), tol=1e-4) == 1


def test_the_registry_knows_each_method_by_its_name():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}


# One of each method with every parameter that it can have.
WHOLE = {
    "lora": [Lora(4), Lora(4, use_dora=True), Lora(4, lora_bias=True)],
    "lokr": [Lokr(1, decompose_both=True), Lokr(8)],
    "shira": [Shira(rank=4)],
    "supertuning": [SuperTuning(sparsity=0.9)],
    "s2ft": [S2ft(channels=4)],
}


@pytest.mark.parametrize("name", METHODS)
def test_the_groups_name_parameters_that_exist(name):
    """Every matrix can be pruned, or none; but a SoRA's gate, which has an axis of length one, is not."""
    kind = METHODS[name]
    site = Site("layer", 16, 16, "embedding" if name == "prompt-tuning" else "linear")
    shapes = {}
    for method in WHOLE.get(name, [kind()]) if issubclass(kind, SiteMethod) and name != "adalora" else []:
        shapes |= method.shapes(site)
    if name == "adalora":
        shapes = kind(init_r=4).shapes(site)
    assert {*kind.prunable, *kind.allocated, *kind.undecayed, *kind.loraplus} <= shapes.keys()
    matrices = {parameter for parameter, shape in shapes.items() if len(shape) > 1}
    assert set(kind.prunable) in (set(), matrices - set(kind.undecayed))


def test_what_the_flags_prune():
    assert [name for name, kind in METHODS.items() if kind.prunable] == ["lora", "hira", "sora", "loha", "lokr", "s2ft"]
    assert [name for name, kind in METHODS.items() if kind.allocated] == ["adalora"]
    assert [name for name, kind in METHODS.items() if kind.loraplus] == ["lora", "sora"]
