"""The initial values are PEFT's: A uniform on ±1/√d_in, B zero, both fp32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.adapters import METHODS, Hira, Lora, Site


@pytest.mark.parametrize("method", [Lora(rank=64), Hira(rank=64)])
@pytest.mark.parametrize("dims", [(256, 512), (1024, 96)])
def test_a_is_uniform_and_b_is_zero(method, dims):
    site = Site("layer", *dims)
    params = method.init(jax.random.key(0), site)
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
    assert not hasattr(Hira(), "scaling")


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
