"""Criteria by hand, and what must hold of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters.entry_effects import of_product
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCORES, Criterion, prune
from jaxpeft.pruning.memory import fresh_memory, gathered, held, sees_pruned
from jaxpeft.pruning.scores import movement, product, random, snip

A, B = jnp.array([[3.0, 1.0], [-4.0, 0.0]]), jnp.array([[1.0, -2.0, 2.0], [0.0, 0.0, 7.0]])
SITES = {"x": {"a": A, "b": B}}


def test_every_criterion_is_one():
    assert all(isinstance(SCORES[name], Criterion) for name in SCORES)


def test_product_by_hand():
    """‖B_1‖ = 3, ‖B_2‖ = 7; ‖A_·1‖ = 5, ‖A_·2‖ = 1."""
    scores = product(SITES, effects=of_product)["x"]
    np.testing.assert_allclose(scores["a"], [[9, 7], [12, 0]], rtol=1e-6)
    np.testing.assert_allclose(scores["b"], [[5, 10, 10], [0, 0, 7]], rtol=1e-6)


def test_product_is_the_change_of_the_update():
    """The score of an entry is the Frobenius norm of what A·B loses with it."""
    pair = {"a": jnp.asarray(tiny.normal(0, 5, 3)), "b": jnp.asarray(tiny.normal(1, 3, 4))}
    scores = product({"x": pair}, effects=of_product)["x"]
    for name, index in (("a", (4, 1)), ("b", (2, 3))):
        without = {**pair, name: pair[name].at[index].set(0.0)}
        lost = jnp.linalg.norm(pair["a"] @ pair["b"] - without["a"] @ without["b"])
        np.testing.assert_allclose(scores[name][index], lost, rtol=1e-5)


@pytest.mark.parametrize("c", [1e-3, 0.5, 64.0])
def test_trap_2_a_rescaled_pair_has_the_same_product_scores(c):
    """Also between A and B; raw magnitudes would move from one to the other with c."""
    pair = {"a": jnp.asarray(tiny.normal(0, 8, 4)), "b": jnp.asarray(tiny.normal(1, 4, 6))}
    scores = product({"x": pair}, effects=of_product)
    again = product({"x": {"a": pair["a"] / c, "b": pair["b"] * c}}, effects=of_product)
    for name in pair:
        np.testing.assert_allclose(again["x"][name], scores["x"][name], rtol=1e-5)


def test_prune_takes_the_criteria_that_need_no_run():
    masks = prune(SITES, 0.5, criterion="product", effects=of_product)["x"]
    np.testing.assert_array_equal(masks["a"], [[True, False], [True, False]])
    assert int(prune(SITES, 0.5, criterion="random", rng=jax.random.key(0))["x"]["b"].sum()) == 3
    with pytest.raises(InputError, match=r"pruning\.criterion product needs to know how entries change"):
        prune(SITES, 0.5, criterion="product")
    with pytest.raises(InputError, match="needs a key: give rng="):
        prune(SITES, 0.5, criterion="random")
    for name in ("snip", "movement"):
        with pytest.raises(InputError, match="needs the gradients of a run"):
            prune(SITES, 0.5, criterion=name)


def test_random_depends_on_key_tensor_and_place_only():
    """A padded tensor draws the same where it is not padding, so runs that train together prune as they do alone."""
    small, large = {"x": {"a": jnp.zeros((3, 2))}}, {"x": {"a": jnp.zeros((5, 4))}}
    one, padded = (random(sites, rng=jax.random.key(0))["x"]["a"] for sites in (small, large))
    np.testing.assert_array_equal(padded[:3, :2], one)
    other = random(small, rng=jax.random.key(1))["x"]["a"]
    assert (other != one).all()
    two = random({"x": {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 2))}}, rng=jax.random.key(0))["x"]
    assert (two["a"] != two["b"]).all()
    assert len(np.unique(padded)) == padded.size


def test_snip_reads_the_mean_gradient_of_a_step():
    """Micro-steps 0 and 1 of a step have gradients 1 and 3; then a new step begins."""
    memory = fresh_memory(("gradient",), SITES)
    ones = jax.tree.map(jnp.ones_like, SITES)
    memory = gathered(memory, SITES, ones, 0)
    memory = gathered(memory, SITES, jax.tree.map(lambda g: 3 * g, ones), 1)
    np.testing.assert_array_equal(snip(SITES, memory=memory)["x"]["a"], 2 * jnp.abs(A))
    memory = gathered(memory, SITES, ones, 0)
    np.testing.assert_array_equal(snip(SITES, memory=memory)["x"]["a"], jnp.abs(A))
    assert sees_pruned(memory)


def test_movement_sums_over_steps_and_a_weight_that_grows_scores_high():
    memory = fresh_memory(("movement",), SITES)
    for sign in (1.0, 2.0):
        memory = gathered(memory, SITES, jax.tree.map(lambda w: -sign * jnp.ones_like(w), SITES), 0)  # noqa: B023
    np.testing.assert_array_equal(movement(SITES, memory=memory)["x"]["a"], 3 * A)
    assert not sees_pruned(memory)


def test_what_is_remembered_at_the_start():
    memory = fresh_memory(("soft", "rewound"), SITES)
    assert list(memory) == ["rewound", "soft"]
    np.testing.assert_array_equal(memory["rewound"]["x"]["b"], B)
    masks = {"x": {"a": jnp.array([[True, False], [False, True]])}}
    assert held(masks, {}) is masks
    np.testing.assert_array_equal(held(masks, memory)["x"]["a"], masks["x"]["a"])
    assert held(masks, {"soft": jnp.asarray(True)})["x"]["a"].all()
