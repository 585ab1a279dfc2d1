"""LoHa and LoKr: their products by hand, their shapes beside PEFT's, and the two dropouts they share."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import InputError
from jaxpeft.adapters import FrozenLayer, Loha, Lokr, Site
from jaxpeft.adapters.lokr import split_width


def layer(w):
    return FrozenLayer(lambda x: x @ w, w.astype, None, w.dtype)


def drawn(method, site, *, scale=1.0):
    params = method.init(jax.random.key(0), site, None)
    return {
        name: jnp.asarray(tiny.normal(i, *leaf.shape, scale=scale)) for i, (name, leaf) in enumerate(params.items())
    }


def test_loha_by_hand():
    """B₁·A₁ = [[3, 4], [6, 8]] and B₂·A₂ = [[1, 0], [2, 0]]; s = 1/2."""
    params = {
        "w1_b": jnp.array([[1.0], [2.0]]),
        "w1_a": jnp.array([[3.0, 4.0]]),
        "w2_b": jnp.array([[1.0], [2.0]]),
        "w2_a": jnp.array([[1.0, 0.0]]),
    }
    np.testing.assert_array_equal(Loha(rank=1, alpha=0.5).kernel(jnp.ones((2, 2)), params), [[2.5, 1], [7, 1]])


def test_loha_reaches_the_square_of_its_rank():
    params = drawn(Loha(rank=2), Site("layer", 12, 10))
    update = Loha(rank=2, alpha=2).kernel(jnp.zeros((12, 10)), params)
    assert np.linalg.matrix_rank(np.asarray(update), tol=1e-4) == 4


@pytest.mark.parametrize("rank", [4, 6])
def test_loha_s_full_update_is_not_kept_for_the_backward_pass(rank):
    """At 64 × 48 rank 4 goes by thin factors and rank 6 by the full update; neither leaves a matrix of that size behind."""
    method, site = Loha(rank=rank), Site("layer", 64, 48)
    params, x = drawn(method, site), jnp.asarray(tiny.normal(9, 5, 64))
    frozen = FrozenLayer(lambda x: jnp.zeros((5, 48)), None, None, jnp.float32)
    _, backward = jax.vjp(lambda x, params: method.forward(x, params, frozen, None), x, params)
    assert max(leaf.size for leaf in jax.tree.leaves(backward)) < 64 * 48


def test_lokr_by_hand():
    """W₁ ⊗ W₂ of [[1, 2], [3, 4]] and [[0, 5], [6, 7]]: the blocks are W₁'s entries times W₂."""
    params = {"w1": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "w2": jnp.array([[0.0, 5.0], [6.0, 7.0]])}
    expected = [[0, 5, 0, 10], [6, 7, 12, 14], [0, 15, 0, 20], [18, 21, 24, 28]]
    method, w = Lokr(rank=1, alpha=1), jnp.zeros((4, 4))
    np.testing.assert_array_equal(method.kernel(w, params), expected)
    np.testing.assert_array_equal(method.forward(jnp.eye(4)[None], params, layer(w), None)[0], expected)


def test_widths_are_split_as_peft_splits_them():
    from peft.tuners.lokr.layer import factorization

    for width, factor in product([*range(1, 130), 768, 3072, 30522], [-1, 1, 2, 3, 4, 7, 8, 12, 16, 24, 64]):
        assert split_width(width, factor) == factorization(width, factor), (width, factor)


@pytest.mark.parametrize("dims", [(32, 48), (48, 32), (13, 30)])
@pytest.mark.parametrize("both", [False, True])
def test_lokr_s_tensors_are_the_transposes_of_peft_s(dims, both):
    import torch
    from peft import LoKrConfig, get_peft_model, get_peft_model_state_dict

    for rank, factor in product([1, 2, 3, 5, 16, 40], [-1, 1, 4, 13]):
        model = torch.nn.Sequential(torch.nn.Linear(*dims))
        config = LoKrConfig(r=rank, decompose_both=both, decompose_factor=factor, target_modules=["0"])
        tensors = get_peft_model_state_dict(get_peft_model(model, config))
        theirs = {key.rpartition("lokr_")[2]: tuple(tensor.shape)[::-1] for key, tensor in tensors.items()}
        assert Lokr(rank=rank, decompose_both=both, decompose_factor=factor).shapes(Site("0", *dims)) == theirs


ONE = {
    "loha": Loha(rank=2, rank_dropout=0.25),
    "lokr": Lokr(rank=2, rank_dropout=0.25),
    "lokr-rescaled": Lokr(rank=2, rank_dropout=0.25, rank_dropout_scale=True),
}


@pytest.mark.parametrize("name", ONE)
def test_rank_dropout_drops_outputs_for_the_whole_batch(name):
    """PEFT: `drop /= drop.mean()` in LoHa always, in LoKr with rank_dropout_scale."""
    method, site = ONE[name], Site("layer", 16, 400)
    assert method.uses_rng
    params, x, w = drawn(method, site), jnp.asarray(tiny.normal(9, 6, 16)), jnp.zeros((16, 400))
    plain = np.asarray(method.forward(x, params, layer(w), None))
    dropped = np.asarray(method.forward(x, params, layer(w), jax.random.key(1)))
    keep = (dropped != 0).any(0)
    np.testing.assert_allclose(dropped, plain * keep * (1 if name == "lokr" else 1 / keep.mean()), rtol=1e-5)
    assert abs(keep.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 400)


@pytest.mark.parametrize("kind", [Loha, Lokr])
def test_module_dropout_leaves_the_whole_adapter_out(kind):
    method, site = kind(rank=2, module_dropout=0.25), Site("layer", 8, 6)
    assert method.uses_rng
    params, x, w = drawn(method, site), jnp.asarray(tiny.normal(9, 5, 8)), jnp.asarray(tiny.normal(8, 8, 6))
    full = method.forward(x, params, layer(w), None)
    outs = jax.vmap(lambda key: method.forward(x, params, layer(w), key))(jax.random.split(jax.random.key(0), 2000))
    on, off = (np.isclose(outs, target, rtol=1e-5, atol=1e-5).all((1, 2)) for target in (full, x @ w))
    assert (on ^ off).all()
    assert abs(off.mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_where_every_output_is_dropped_nothing_is_added():
    method = Loha(rank_dropout=0.9)
    y = jax.vmap(lambda key: method.dropped(jnp.ones((3, 2)), key, rescaled=True))(
        jax.random.split(jax.random.key(0), 100)
    )
    assert np.isfinite(y).all()
    assert (np.asarray(y) == 0).all((1, 2)).any()


def test_bad_options_are_refused():
    with pytest.raises(InputError, match=r"adapter\.rank 0 must be at least 1"):
        Lokr(rank_pattern={"query": 0}).at("a/query")
    with pytest.raises(InputError, match=r"module_dropout is 1\.0; it must be at least 0 and below 1"):
        Loha(module_dropout=1.0)
    with pytest.raises(InputError, match="unknown init_weights 'lycros'; it must be true, false or lycoris"):
        Lokr(init_weights="lycros").init(jax.random.key(0), Site("layer", 4, 4), None)
