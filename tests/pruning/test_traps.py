"""The four traps of pruning an adapter, each a test."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxpeft.adapters import Lora, Site
from jaxpeft.pruning import apply_masks, num_kept, prune
from jaxpeft.training.optimizer import build_optimizer, hold_pruned_at_zero
from jaxpeft.training.step import TrainState, prune_step


def test_1_at_the_start_b_says_nothing_and_after_some_steps_it_does():
    """B = 0: all its entries tie and the mask is the first half, whatever the data. Hence masks come after the warm-up."""
    params = Lora(rank=4).init(jax.random.key(0), Site("layer", 8, 6), lambda: jnp.zeros((8, 6)))
    first_half = np.arange(24).reshape(4, 6) < 12
    np.testing.assert_array_equal(prune({"layer": params}, 0.5)["layer"]["b"], first_half)
    x, y = tiny.normal(0, 32, 8), tiny.normal(1, 32, 6)
    gradient = jax.grad(lambda p: jnp.square(x @ p["a"] @ p["b"] - y).mean())(params)
    trained = {"a": params["a"], "b": params["b"] - 0.1 * gradient["b"]}
    mask = prune({"layer": trained}, 0.5)["layer"]["b"]
    assert mask.sum() == 12
    assert (mask != first_half).any()
    assert np.abs(trained["b"])[mask].min() >= np.abs(trained["b"])[~mask].max()


@pytest.mark.parametrize("c", [1e-3, 0.5, 64.0])
def test_2_a_rescaled_pair_is_the_same_adapter_and_keeps_the_same_entries(c):
    pair = {"a": jnp.asarray(tiny.normal(0, 8, 4)), "b": jnp.asarray(tiny.normal(1, 4, 6))}
    rescaled = {"a": pair["a"] / c, "b": pair["b"] * c}
    masks, again = prune({"layer": pair}, 0.5), prune({"layer": rescaled}, 0.5)
    for name in pair:
        np.testing.assert_array_equal(masks["layer"][name], again["layer"][name])
    one, other = apply_masks({"layer": pair}, masks)["layer"], apply_masks({"layer": rescaled}, again)["layer"]
    np.testing.assert_allclose(other["a"] @ other["b"], one["a"] @ one["b"], rtol=1e-5, atol=1e-6)


def train(optimizer, adapters, masks, steps):
    """Steps whose gradients reach every entry, pruned ones too: only the projection can hold those."""

    @jax.jit
    def step(adapters, state, gradient):
        updates, state = optimizer.update(gradient, state, adapters, masks=masks)
        return optax.apply_updates(adapters, updates), state

    state = optimizer.init(adapters)
    for i in range(steps):
        gradient = jax.tree.map(lambda leaf: jnp.asarray(tiny.normal(i, *leaf.shape)), adapters)  # noqa: B023
        adapters, state = step(adapters, state, gradient)
        yield adapters


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_3_neither_momentum_nor_decay_revives_a_pruned_entry(accumulation_steps):
    optimizer = build_optimizer(
        optax.constant_schedule(0.1), weight_decay=0.3, max_grad_norm=1.0, accumulation_steps=accumulation_steps
    )
    sites = {"layer": {"a": jnp.asarray(tiny.normal(0, 6, 4)), "b": jnp.asarray(tiny.normal(1, 4, 5))}}
    modules = {"head": {"kernel": jnp.ones((3, 2))}}
    # Fifteen dense updates first, so that Adam's moments are full when the masks come.
    *_, adapters = train(optimizer, {"sites": sites, "modules": modules}, {}, 15)
    masks = prune(adapters["sites"], 0.5)
    adapters = {**adapters, "sites": apply_masks(adapters["sites"], masks)}
    before = tiny.snapshot(adapters)
    for trained in train(optimizer, adapters, masks, 60):
        for name, mask in masks["layer"].items():
            assert not trained["sites"]["layer"][name][~mask].any()
    for name, mask in masks["layer"].items():
        moved = np.asarray(trained["sites"]["layer"][name]) != before["sites"]["layer"][name]
        np.testing.assert_array_equal(moved, mask)  # and every kept entry trains
    assert (trained["modules"]["head"]["kernel"] != before["modules"]["head"]["kernel"]).all()


def test_3_without_the_projection_it_would_be_revived():
    """What the projection is for: Adam alone moves a pruned entry at once."""
    adapters = {"sites": {"layer": {"a": jnp.array([0.0, 1.0])}}, "modules": {}}
    masks = {"layer": {"a": jnp.array([False, True])}}
    free = optax.chain(optax.adamw(0.1), optax.identity())
    held = optax.chain(optax.adamw(0.1), hold_pruned_at_zero())
    assert next(train(optax.with_extra_args_support(free), adapters, masks, 1))["sites"]["layer"]["a"][0] != 0
    assert next(train(held, adapters, masks, 1))["sites"]["layer"]["a"][0] == 0


def test_3_the_projection_takes_an_entry_that_is_not_yet_zero_to_zero():
    adapters = {"sites": {"layer": {"a": jnp.array([0.7, 1.0])}}, "modules": {}}
    masks = {"layer": {"a": jnp.array([False, True])}}
    assert next(train(hold_pruned_at_zero(), adapters, masks, 1))["sites"]["layer"]["a"][0] == 0


@pytest.mark.parametrize("sparsity", [0.5, 0.61, 0.9])
def test_4_the_mask_is_exact_and_stays_exact(sparsity):
    """Not "about half": the count of every odd-sized tensor, after one pruning and after the next."""
    sites = {"layer": {"a": jnp.asarray(tiny.normal(0, 7, 3)), "b": jnp.asarray(tiny.normal(1, 3, 5))}}
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), sites)
    state = TrainState(jnp.int32(0), {"sites": sites, "modules": {}}, masks, (), jax.random.key(0))
    for share in (sparsity / 2, sparsity):
        counts = {"layer": {name: num_kept(leaf.size, share) for name, leaf in sites["layer"].items()}}
        state = prune_step(state, counts)
        for name, count in counts["layer"].items():
            assert int(state.masks["layer"][name].sum()) == count
            assert int((state.adapters["sites"]["layer"][name] != 0).sum()) == count
