import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxpeft.adapters import Lora
from jaxpeft.training.optimizer import LoraPlus, build_optimizer, decayed, learning_rate_schedule

ADAPTERS = {
    "sites": {"layer": {"a": jnp.full((4, 2), 2.0), "b": jnp.full((2, 3), 3.0)}},
    "modules": {
        "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
        "head": {"kernel": jnp.full((4, 3), 5.0), "bias": jnp.ones(3)},
    },
}
ZERO = jax.tree.map(jnp.zeros_like, ADAPTERS)


def gradients(seed):
    return jax.tree.map(lambda leaf: jnp.asarray(tiny.normal(seed, *leaf.shape)), ADAPTERS)


def update(optimizer, gradient, state=None, masks=None):
    """`(updates, state)`, compiled; from the initial state where none is given."""
    compiled = jax.jit(lambda gradient, state: optimizer.update(gradient, state, ADAPTERS, masks=masks or {}))
    return compiled(gradient, optimizer.init(ADAPTERS) if state is None else state)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize(("decay", "half", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
def test_schedule_rises_to_its_peak_and_falls_to_the_last_update(decay, half, end, warmup):
    peak, num_steps = 3e-4, 20 + warmup
    schedule = learning_rate_schedule(peak, num_steps, warmup, decay)
    rising = [float(schedule(step)) for step in range(warmup)]
    np.testing.assert_allclose(rising, [peak * step / warmup for step in range(warmup)], rtol=1e-6)
    assert float(schedule(warmup)) == pytest.approx(peak, rel=1e-6)
    assert float(schedule(warmup + 10)) == pytest.approx(peak * half, rel=1e-6)
    assert float(schedule(num_steps)) == pytest.approx(peak * end, rel=1e-6, abs=1e-12)
    values = np.array([schedule(step) for step in range(num_steps)])
    assert (values[warmup:] > 0).all()  # no update after the warm-up is wasted
    assert values.argmax() == warmup


def test_cosine_by_hand():
    schedule = learning_rate_schedule(1.0, 14, 2, "cosine")
    np.testing.assert_allclose(schedule(2 + 4), (1 + np.cos(np.pi / 3)) / 2, rtol=1e-6)


def test_weight_decay_spares_biases_and_norms():
    optimizer = build_optimizer(optax.constant_schedule(0.1), weight_decay=0.5, max_grad_norm=0.0)
    updates, _ = update(optimizer, ZERO)
    expected = jax.tree.map(lambda leaf: -0.1 * 0.5 * leaf, ADAPTERS)
    for layer in ("norm", "head"):
        expected["modules"][layer]["bias"] = jnp.zeros_like(ADAPTERS["modules"][layer]["bias"])
    expected["modules"]["norm"]["scale"] = jnp.zeros(4)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert decayed(ADAPTERS)["sites"]["layer"] == {"a": True, "b": True}


def test_weight_decay_spares_what_the_method_names():
    """A parameter of a method is spared by its method's word, and not because of its name."""
    sites = {"layer": {name: jnp.ones(2) for name in ("a", "bias", "scale")}}
    adapters = {"sites": sites, "modules": ADAPTERS["modules"]}
    assert decayed(adapters)["sites"]["layer"] == {"a": True, "bias": True, "scale": True}
    tree = decayed(adapters, undecayed=Lora.undecayed)
    assert tree["sites"]["layer"] == {"a": True, "bias": False, "scale": True}
    assert tree["modules"]["norm"] == {"scale": False, "bias": False}
    assert tree["modules"]["head"] == {"kernel": True, "bias": False}
    optimizer = build_optimizer(
        optax.constant_schedule(0.1), weight_decay=0.5, max_grad_norm=0.0, undecayed=Lora.undecayed
    )
    zero = jax.tree.map(jnp.zeros_like, adapters)
    updates, _ = optimizer.update(zero, optimizer.init(adapters), adapters, masks={})
    np.testing.assert_allclose([updates["sites"]["layer"][name][0] for name in ("a", "bias")], [-0.05, 0], rtol=1e-6)


def test_lora_plus_goes_by_the_names_it_is_given():
    plus = LoraPlus(4.0, ("b",), 0.5, frozenset({"words"}))
    sites = {"layer": {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2)), "m": jnp.ones(2)}}
    sites["words"] = dict(sites["layer"])
    found = plus.factors({"sites": sites, "modules": {"head": {"b": jnp.ones((2, 2)), "bias": jnp.ones(2)}}})
    assert found["sites"] == {"layer": {"a": 1.0, "b": 4.0, "m": 4.0}, "words": {"a": 0.5, "b": 0.5, "m": 4.0}}
    assert found["modules"] == {"head": {"b": 1.0, "bias": 4.0}}


@pytest.mark.parametrize(("max_grad_norm", "factor"), [(0.0, 1.0), (0.5, None), (1e6, 1.0)])
def test_gradients_are_clipped_to_their_global_norm(max_grad_norm, factor):
    """Seen in Adam's first moment, a tenth of the gradient after one update; the update itself forgets the scale."""
    optimizer = build_optimizer(optax.constant_schedule(0.1), weight_decay=0.0, max_grad_norm=max_grad_norm)
    gradient = gradients(0)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    _, state = update(optimizer, gradient)
    factor = factor or max_grad_norm / norm
    expected = jax.tree.map(lambda leaf: 0.1 * factor * leaf, gradient)
    chex.assert_trees_all_close(optax.tree.get(state, "mu"), expected, rtol=1e-5)


def test_two_accumulated_gradients_are_one_update_of_their_mean():
    """Clipping comes after the mean; the first pass changes nothing."""
    options = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    one = build_optimizer(optax.constant_schedule(0.1), **options)
    two = build_optimizer(optax.constant_schedule(0.1), **options, accumulation_steps=2)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, gradients(0), gradients(1))
    expected, _ = update(one, mean)
    nothing, state = update(two, gradients(0))
    chex.assert_trees_all_equal(nothing, ZERO)
    updates, state = update(two, gradients(1), state)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
    assert int(state.gradient_step) == 1


def test_masks_reach_the_projection_through_accumulation():
    optimizer = build_optimizer(optax.constant_schedule(0.1), weight_decay=0.1, max_grad_norm=0.0, accumulation_steps=2)
    keep = jnp.zeros((4, 2), bool).at[0].set(True)
    state = optimizer.init(ADAPTERS)
    for seed in range(2):
        updates, state = update(optimizer, gradients(seed), state, {"layer": {"a": keep}})
    pruned = optax.apply_updates(ADAPTERS, updates)["sites"]["layer"]
    np.testing.assert_array_equal(pruned["a"] == 0, ~keep)
    assert (pruned["b"] != 0).all()
