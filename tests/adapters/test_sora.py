"""SoRA's gate: its threshold by hand, zeros that training finds, and the smaller LoRA in its file."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxpeft.adapters import Lora, Sora
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.interop.peft.files import BaseInfo, load_adapter, save_adapter
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer, soft_threshold
from jaxpeft.training.step import init_state, make_train_step

METHOD = Sora(rank=4, alpha=6.0, sparse_lambda=0.15)


def test_the_soft_threshold_by_hand():
    """w + u moves by λ towards zero and stops there; other parameters are left alone."""
    params = {"sites": {"x": {"g": jnp.array([[1.0, -1.0, 0.2, 0.0]]), "a": jnp.ones((1, 1))}}, "modules": {}}
    updates = {"sites": {"x": {"g": jnp.array([[0.5, 0.1, -0.1, -0.3]]), "a": jnp.ones((1, 1))}}, "modules": {}}
    link = soft_threshold({"g": 0.25})
    new = optax.apply_updates(params, link.update(updates, link.init(params), params)[0])
    np.testing.assert_allclose(new["sites"]["x"]["g"], [[1.25, -0.65, 0.0, -0.05]], atol=1e-7)
    assert float(new["sites"]["x"]["g"][0, 2]) == 0
    assert float(new["sites"]["x"]["a"][0, 0]) == 2


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_threshold_acts_once_a_step(accumulation_steps):
    optimizer = build_optimizer(
        optax.constant_schedule(0.0),
        weight_decay=0.0,
        max_grad_norm=0.0,
        accumulation_steps=accumulation_steps,
        thresholds={"g": 0.25},
    )
    params = {"sites": {"x": {"g": jnp.array([[1.0, -0.1]])}}, "modules": {}}
    state, gradient = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    for _ in range(accumulation_steps):
        updates, state = optimizer.update(gradient, state, params, masks={})
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["sites"]["x"]["g"], [[0.75, 0.0]])


@pytest.fixture(scope="module")
def trained():
    """A toy after twenty steps, with the base and the objective it was trained by."""
    toy = tiny.Toy()
    toy.module = tiny.Toy.Module(dropout=0.0)
    frozen, adapters = tiny.adapted(toy, METHOD, nonzero=False)
    optimizer = build_optimizer(
        optax.constant_schedule(1e-2), weight_decay=0.01, max_grad_norm=1.0, thresholds=METHOD.thresholds
    )
    objective = Objective(toy, METHOD, tiny.task_of(toy))
    state, step = (
        init_state(adapters, optimizer, jax.random.key(0), pruned=False),
        make_train_step(objective, optimizer),
    )
    for i in range(8):
        state, _ = step(state, frozen, tiny.batch(seed=i))
    return toy, frozen, state.adapters


def test_training_closes_gates(trained):
    gates = np.concatenate([np.asarray(site["g"])[0] for site in trained[2]["sites"].values()])
    assert 0 < (gates == 0).sum() < gates.size


def test_the_saved_lora_computes_the_same(trained):
    """It has the ranks that are left and the scaling of before."""
    toy, frozen, adapters = trained
    lora, sites = METHOD.as_saved(adapters["sites"])
    assert isinstance(lora, Lora)
    for path, site in adapters["sites"].items():
        left = max(1, int((np.asarray(site["g"]) != 0).sum()))
        assert sites[path]["a"].shape[1] == sites[path]["b"].shape[0] == left == lora.at(path).rank
        assert lora.at(path).scaling == pytest.approx(METHOD.scaling)
    ids = tiny.batch()["input_ids"]
    gated = apply(toy.module, frozen, adapters, METHOD, input_ids=ids).logits
    plain = apply(toy.module, frozen, {**adapters, "sites": sites}, lora, input_ids=ids).logits
    np.testing.assert_allclose(plain, gated, atol=1e-6, rtol=1e-6)


def test_a_layer_without_a_gate_keeps_a_rank_of_zeros():
    sites = {"x": {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 5)), "g": jnp.zeros((1, 2))}}
    lora, left = Sora(rank=2, alpha=4.0).as_saved(sites)
    assert (lora.rank_pattern, lora.alpha_pattern) == ({"x": 1}, {"x": 2.0})
    np.testing.assert_array_equal(left["x"]["a"], np.zeros((3, 1)))
    whole, same = Sora(rank=2).as_saved({"x": {**sites["x"], "g": jnp.array([[2.0, 3.0]])}})
    assert (whole.rank_pattern, whole.alpha_pattern) == ({}, {})
    np.testing.assert_array_equal(same["x"]["a"], [[2, 3]] * 3)


def test_the_file_is_a_lora(bert, tmp_path):
    frozen, adapters = tiny.adapted(bert, METHOD)
    sites = {
        path: {**site, "g": site["g"].at[0, i % 4].set(0.0)} for i, (path, site) in enumerate(adapters["sites"].items())
    }
    adapters = {**adapters, "sites": sites}
    save_adapter(tmp_path, adapters, METHOD, base=BaseInfo.of(bert))
    loaded, again, method = load_adapter(tmp_path, bert.params)
    assert isinstance(method, Lora)
    assert set(method.rank_pattern.values()) == {3}
    inputs = bert.inputs(tiny.batch())
    # In float64: what is compared is what the file holds, and not how a processor rounds a whole model.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        model, *trees = tiny.doubled(bert, frozen, adapters, loaded, again)
        expected = apply(model.module, *trees[:2], METHOD, **inputs).logits
        np.testing.assert_allclose(apply(model.module, *trees[2:], method, **inputs).logits, expected, atol=1e-6)


def test_a_threshold_that_is_not_positive_is_refused():
    with pytest.raises(InputError, match=r"adapter\.sparse_lambda is 0\.0; it must be above 0"):
        replace(METHOD, sparse_lambda=0.0)
