"""Masks by hand, on tensors of four entries."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.errors import InputError
from jaxpeft.pruning import SCORES, Criterion, apply_masks, magnitude, num_kept, prune, sparsity_of, tighten
from jaxpeft.pruning.masks import churn, keep_counts
from jaxpeft.pruning.record import mask_record
from jaxpeft.pruning.structures import keep_largest


def sites(*tensors):
    """A layer of matrices; a list of numbers is a matrix of one row."""
    return {"layer": {f"t{i}": jnp.atleast_2d(jnp.asarray(tensor)) for i, tensor in enumerate(tensors)}}


def kept(masks):
    return [np.asarray(mask).astype(int).reshape(-1).tolist() for mask in masks["layer"].values()]


def test_only_what_a_method_names_is_pruned():
    sites = {"layer": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "m": jnp.ones(4)}}
    assert keep_counts(sites, 0.5) == {"layer": {"a": 4, "b": 3}}
    assert keep_counts(sites, 0.5, ("a",)) == {"layer": {"a": 4}}
    assert keep_counts(sites, 0.5, ("b", "m")) == {"layer": {"b": 3, "m": 2}}
    assert keep_counts(sites, 0.5, ()) == {}


def test_the_largest_magnitudes_stay():
    assert kept(prune(sites([0.1, -0.4, 0.3, -0.2]), 0.5)) == [[0, 1, 1, 0]]
    assert kept(prune(sites([[0.1, -0.4], [0.3, -0.2]]), 0.25)) == [[0, 1, 1, 1]]
    assert kept(prune(sites([0.1, -0.4, 0.3, -0.2]), 0.0)) == [[1, 1, 1, 1]]


def test_ties_keep_the_lower_index():
    assert kept(prune(sites([2.0, -2.0, 2.0, -2.0]), 0.5)) == [[1, 1, 0, 0]]
    assert kept(prune(sites([1.0, 2.0, -1.0, 1.0]), 0.5)) == [[1, 1, 0, 0]]
    assert kept(prune(sites([0.0, 0.0, -0.0, 0.0]), 0.75)) == [[1, 0, 0, 0]]


def test_each_tensor_is_ranked_alone():
    """The second tensor is a thousand times the first and loses half of its entries all the same."""
    small, large = [0.1, 0.4, 0.3, 0.2], [100.0, 400.0, 300.0, 200.0]
    assert kept(prune(sites(small, large), 0.5)) == [[0, 1, 1, 0]] * 2


def test_a_vector_is_never_pruned():
    """A zero in DoRA's magnitude would switch an output off."""
    layer = {"layer": {"a": jnp.ones((2, 2)), "m": jnp.array([1.0, 0.1, 0.2, 0.3])}}
    masks = prune(layer, 0.5)["layer"]
    assert (int(masks["a"].sum()), int(masks["m"].sum())) == (2, 4)


@pytest.mark.parametrize(
    ("size", "sparsity", "expected"),
    [(4, 0.5, 2), (5, 0.5, 2), (7, 0.5, 4), (3, 0.9, 1), (1, 0.99, 1), (10, 0.9, 1), (1000, 0.999, 1), (9, 0.0, 9)],
)
def test_counts_are_exact(size, sparsity, expected):
    """max(1, round(size·(1 − sparsity))), a half rounded to the even count."""
    assert num_kept(size, sparsity) == expected


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(7, 3), (1, 17)])
def test_counts_are_exact_for_odd_shapes_and_for_equal_values(shape, sparsity):
    value = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = max(1, round(value.size * (1 - sparsity)))
    assert [int(m.sum()) for m in prune(sites(value, value * 0), sparsity)["layer"].values()] == [expected] * 2


def test_what_is_pruned_stays_pruned_as_the_sparsity_grows():
    values, masks = np.random.default_rng(0).standard_normal((20, 16)).astype(np.float32), {}
    for step, sparsity in enumerate([0.1, 0.3, 0.5, 0.5, 0.8]):
        # Entries change between prunings, the pruned ones too (as if nothing held them at zero).
        tree = sites(values * np.random.default_rng(step).uniform(0.1, 10, values.shape).astype(np.float32))
        tighter = tighten(masks, magnitude(tree), keep_counts(tree, sparsity))
        if masks:
            assert not (tighter["layer"]["t0"] & ~masks["layer"]["t0"]).any()
        assert int(tighter["layer"]["t0"].sum()) == num_kept(values.size, sparsity)
        masks = tighter


def test_a_pruned_entry_stays_behind_a_zero_that_was_kept():
    tree, masks = sites([5.0, 0.0, 0.0, 1.0]), {"layer": {"t0": jnp.array([False, True, True, True])}}
    assert kept(tighten(masks, magnitude(tree), {"layer": {"t0": 2}})) == [[0, 1, 0, 1]]


def test_a_pruned_entry_stays_behind_any_score():
    scores, masks = sites([5.0, -7.0, -9.0, -8.0]), {"layer": {"t0": jnp.array([False, True, True, True])}}
    assert kept(tighten(masks, scores, {"layer": {"t0": 2}})) == [[0, 1, 0, 1]]


@Criterion
def smallest(sites, **context):
    """Another criterion: the opposite of magnitude."""
    return jax.tree.map(lambda leaf: -jnp.abs(leaf), sites)


def test_prune_looks_its_criterion_up(monkeypatch):
    monkeypatch.setitem(SCORES._places, "smallest", f"{__name__}:smallest")
    tree = sites([0.1, -0.4, 0.3, -0.2])
    assert kept(prune(tree, 0.5, criterion="smallest")) == [[1, 0, 0, 1]]
    with pytest.raises(InputError, match=r"no pruning criterion 'magnitud'; did you mean 'magnitude'\?"):
        prune(tree, 0.5, criterion="magnitud")


def test_apply_masks_zeroes_what_is_pruned_and_leaves_the_rest():
    tree = {"x": {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, jnp.nan])}, "y": {"a": jnp.array([4.0])}}
    masks = {"x": {"a": jnp.array([False, True]), "b": jnp.array([True, False])}}
    out = apply_masks(tree, masks)
    np.testing.assert_array_equal(out["x"]["a"], [0, 2])
    np.testing.assert_array_equal(out["x"]["b"], [3, 0])  # a NaN is gone too, not multiplied by 0
    assert out["y"]["a"] is tree["y"]["a"]
    assert apply_masks(tree, {}) == tree


def test_the_indices_of_a_sparse_update_are_no_mask():
    before = {"layer": {"indices": np.array([4, 2, 9, 5])}, "other": {"indices": np.array([1])}}
    after = {"layer": {"indices": np.array([2, 7, 4, 5])}, "other": {"indices": np.array([1])}}
    assert churn(before, after) == 1 / 5  # 7 is new
    assert sparsity_of(after) == 0
    assert mask_record(3, after, before) == {
        "step": 3,
        "kept": {"layer:indices": 4, "other:indices": 1},
        "size": {"layer:indices": 4, "other:indices": 1},
        "ranks": {},
        "churn": 1 / 5,
    }


def test_sparsity_of_is_the_share_over_all_masks():
    masks = {"x": {"a": jnp.array([True, False, False]), "b": jnp.array([True])}}
    assert sparsity_of(masks) == 0.5
    assert sparsity_of({}) == 0.0


def test_one_program_serves_every_step_of_a_schedule():
    score = jnp.array([3.0, 1.0, 2.0, 0.0])
    largest = jax.jit(chex.assert_max_traces(lambda score, count: keep_largest(score, count), n=1))
    for count in (4, 3, 2, 1):
        np.testing.assert_array_equal(largest(score, count), score >= 4 - count)


class Variants(chex.TestCase):
    """What a compiled step does to masks is what the functions say, compiled or not, on the device or handed from the host."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_pruning_and_applying(self):
        tree = {"x": {"a": np.float32([[3, -1, 2, -2]]), "m": np.float32([1, 0])}}

        @self.variant
        def pruned(sites):
            masks = tighten({}, magnitude(sites), keep_counts(sites, 0.5))
            return masks, apply_masks(sites, masks)

        masks, sites = pruned(tree)
        chex.assert_trees_all_equal(masks, {"x": {"a": np.array([[True, False, True, False]]), "m": np.ones(2, bool)}})
        chex.assert_trees_all_equal(sites, {"x": {"a": np.float32([[3, 0, 2, 0]]), "m": np.float32([1, 0])}})
