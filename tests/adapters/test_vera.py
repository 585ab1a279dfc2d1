"""VeRA: random factors that all layers share, whatever else the run draws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import InputError
from jaxpeft.adapters import FrozenLayer, Site, Vera
from jaxpeft.adapters.base import dropout
from jaxpeft.trees import SHARED

SITES = {"a": Site("a", 3, 7), "b": Site("b", 5, 2)}


def test_the_meaning_by_hand():
    """λ_d = 2 and λ_b = (1, 10) around A = (1, 2 | 9) and B = (3, 4 | 9): the layer is 2 × 2 and uses what is before the bar."""
    params = {
        "vera_a": jnp.array([[1.0], [2.0], [9.0]]),
        "vera_b": jnp.array([[3.0, 4.0, 9.0]]),
        "lambda_d": jnp.array([2.0]),
        "lambda_b": jnp.array([1.0, 10.0]),
    }
    w = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(Vera(rank=1).kernel(w, params), [[1 + 6, 2 + 80], [3 + 12, 4 + 160]])


def test_the_factors_are_as_wide_as_the_widest_layers_and_depend_on_the_key_alone():
    method = Vera(rank=6)
    shared = method.init_shared(jax.random.key(0), SITES)
    assert {name: leaf.shape for name, leaf in shared.items()} == {"vera_a": (5, 6), "vera_b": (6, 7)}
    assert method.shared_shapes(SITES) == {"vera_a": (5, 6), "vera_b": (6, 7)}
    again = method.init_shared(jax.random.key(1), dict(reversed(SITES.items())))
    chex.assert_trees_all_equal(shared, again)
    other = Vera(rank=6, projection_prng_key=1).init_shared(jax.random.key(0), SITES)
    assert all((shared[name] != other[name]).all() for name in shared)


def test_two_vectors_a_layer_train_and_the_factors_stay_frozen():
    toy = tiny.Toy()
    frozen, adapters = tiny.adapted(toy, Vera(rank=40), nonzero=False, target_modules=["up", "down"])
    assert frozen[SHARED]["vera_a"].shape == (24, 40)
    assert {path: {k: v.shape for k, v in site.items()} for path, site in adapters["sites"].items()} == {
        "up": {"lambda_d": (40,), "lambda_b": (24,)},
        "down": {"lambda_d": (40,), "lambda_b": (99,)},
    }
    assert all((site["lambda_d"] == np.float32(0.1)).all() for site in adapters["sites"].values())


def test_dropout_falls_on_the_adapter_s_input_alone():
    method, rng, w = Vera(rank=4, dropout=0.5), jax.random.key(3), jnp.asarray(tiny.normal(0, 5, 7))
    params = method.init_shared(rng, SITES) | {"lambda_d": jnp.ones(4), "lambda_b": jnp.ones(7)}
    x = jnp.asarray(tiny.normal(1, 8, 5))
    layer = FrozenLayer(lambda x: x @ w, w.astype, None, jnp.float32)
    expected = x @ w + dropout(x, 0.5, rng) @ (method.kernel(w, params) - w)
    np.testing.assert_allclose(method.forward(x, params, layer, rng), expected, rtol=1e-5, atol=1e-5)


def test_no_rank_is_refused():
    with pytest.raises(InputError, match=r"adapter\.rank 0 must be at least 1"):
        Vera(0)


@pytest.mark.parametrize("key", [0, 7, 123456789])
@pytest.mark.parametrize(("rank", "widths"), [(4, (5, 7)), (256, (768, 3072))])
def test_the_factors_are_torch_s_of_the_same_key(key, rank, widths):
    """Bit for bit: what `save_projection=False` leaves out can be drawn again on either side."""
    import torch
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator().manual_seed(key)
    a, b = _kaiming_init((rank, widths[0]), generator=generator), _kaiming_init((widths[1], rank), generator=generator)
    shared = Vera(rank=rank, projection_prng_key=key).init_shared(jax.random.key(0), {"layer": Site("layer", *widths)})
    np.testing.assert_array_equal(shared["vera_a"].T, a)
    np.testing.assert_array_equal(shared["vera_b"].T, b)


def test_golden_factors():
    """Key 0, r = 2, two wide: torch 2.13.0, peft 0.21.2."""
    shared = Vera(rank=2).init_shared(jax.random.key(0), {"layer": Site("layer", 2, 2)})
    np.testing.assert_array_equal(
        shared["vera_a"].T,
        np.float32([[-0.012967552989721298, 0.9291475415229797], [-1.425555944442749, -1.2746837139129639]]),
    )
    np.testing.assert_array_equal(
        shared["vera_b"].T,
        np.float32([[-0.6671069264411926, 0.46446216106414795], [-0.03431743383407593, 1.3733248710632324]]),
    )
