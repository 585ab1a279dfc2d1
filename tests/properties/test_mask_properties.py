"""Masks on any values: exact counts, the largest entries, the lower index among equals, and never an entry come back."""

import chex
import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxpeft.pruning import apply_masks, magnitude, num_kept, prune, sparsity_of, tighten
from jaxpeft.pruning.allocation import keep_important
from jaxpeft.pruning.masks import keep_counts
from jaxpeft.pruning.schedules import Cubic
from jaxpeft.pruning.structures import keep_largest

# A few shapes, each compiled once. Whole numbers and few of them, so that there are ties.
SHAPES = [(1, 1), (1, 7), (5, 3), (4, 8)]
VALUES = st.integers(-3, 3).map(np.float32)
SPARSITIES = st.floats(0, 0.999)
largest, important = jax.jit(keep_largest), jax.jit(keep_important)


def matrices():
    return st.sampled_from(SHAPES).flatmap(lambda shape: arrays(np.float32, shape, elements=VALUES))


@st.composite
def sites(draw):
    """Two layers of two matrices and a vector."""
    names = ("a", "b")
    matrix = {path: {name: draw(matrices()) for name in names} for path in ("x", "y")}
    return {**matrix, "y": {**matrix["y"], "m": draw(arrays(np.float32, (7,), elements=VALUES))}}


@given(matrices(), st.data())
def test_the_largest_are_kept_and_of_equals_the_first(score, data):
    """As Python's sort says it, which is stable."""
    count = data.draw(st.integers(0, score.size))
    mask = np.asarray(largest(score, count))
    order = sorted(range(score.size), key=lambda i: -score.flat[i])
    assert set(np.flatnonzero(mask)) == set(order[:count])


@given(sites(), SPARSITIES)
def test_counts_are_exact_and_vectors_whole(tree, sparsity):
    for path, masks in prune(tree, sparsity).items():
        for name, mask in masks.items():
            assert mask.shape == tree[path][name].shape
            assert int(mask.sum()) == (7 if name == "m" else max(1, round(mask.size * (1 - sparsity))))


@given(st.integers(1, 10**7), SPARSITIES, SPARSITIES)
def test_more_sparsity_never_keeps_more(size, one, other):
    low, high = sorted((one, other))
    assert 1 <= num_kept(size, high) <= num_kept(size, low) <= size


@given(sites(), sites(), st.lists(SPARSITIES, min_size=2, max_size=4))
def test_masks_only_tighten(tree, other, sparsities):
    """Whatever becomes of the values in between."""
    masks = {}
    for i, sparsity in enumerate(sorted(sparsities)):
        # The shapes of a run do not change: the values of `other` where it has the same shape.
        now = jax.tree.map(lambda a, b: b if i % 2 and a.shape == b.shape else a, tree, other)  # noqa: B023
        tighter = tighten(masks, magnitude(now), keep_counts(now, sparsity))
        if masks:
            assert not any(jax.tree.leaves(jax.tree.map(lambda new, old: (new & ~old).any(), tighter, masks)))
        masks = tighter
    assert 0 <= sparsity_of(masks) <= max(sparsities) + 0.5


@given(sites(), SPARSITIES)
def test_applying_masks_twice_is_applying_them_once(tree, sparsity):
    masks = prune(tree, sparsity)
    once = apply_masks(tree, masks)
    chex.assert_trees_all_equal(apply_masks(once, masks), once)
    chex.assert_trees_all_equal(once, jax.tree.map(lambda keep, value: np.where(keep, value, 0), masks, tree))


@given(sites(), SPARSITIES)
def test_the_scale_of_a_tensor_decides_nothing(tree, sparsity):
    """(A/c, cB) is the same adapter and has the same masks."""
    scaled = {path: {**p, "a": p["a"] / 4, "b": p["b"] * 4} for path, p in tree.items()}
    chex.assert_trees_all_equal(prune(scaled, sparsity), prune(tree, sparsity))


@given(st.lists(st.integers(0, 1000), min_size=6, max_size=6, unique=True), st.integers(0, 6))
def test_a_budget_of_triplets_is_spent_on_the_highest_scores(scores, budget):
    """Of all layers together; scores that differ leave no tie."""
    layers = {"x": np.float32(scores[:4]), "y": np.float32(scores[4:])}
    zeros = {path: {"a": np.zeros((3, s.size), "f"), "b": np.zeros((s.size, 3), "f")} for path, s in layers.items()}
    sensitivity = {path: {**zeros[path], "e": s[None]} for path, s in layers.items()}
    uncertainty = {path: {**zeros[path], "e": np.ones_like(s)[None]} for path, s in layers.items()}
    kept = important({"sensitivity": sensitivity, "uncertainty": uncertainty}, budget)
    chosen = [score for path, s in layers.items() for score, keep in zip(s, kept[path]["e"][0], strict=True) if keep]
    assert sorted(chosen) == sorted(scores)[6 - budget :]


@given(SPARSITIES, st.integers(0, 50), st.integers(1, 50), st.integers(1, 9))
def test_the_cubic_schedule_only_rises_and_ends_where_it_should(sparsity, begin, length, every):
    schedule = Cubic(sparsity, begin, begin + length, every)
    course = [schedule.sparsity_at(step) for step in range(begin + length + 5)]
    assert course == sorted(course)
    assert course[begin] == 0
    assert course[begin + length] == course[-1] == sparsity
    due = [step for step in range(begin + length + 5) if schedule.due(step)]
    assert due[-1] == schedule.last_step
