"""Paired differences: by hand where they can be, and scipy's interval."""

import numpy as np
import pytest

from jaxpeft.comparison.statistics import paired_difference


def test_a_difference_that_every_seed_shows():
    found = paired_difference([0.84, 0.86, 0.88], [0.80, 0.83, 0.83])
    assert found.mean == pytest.approx(0.04)
    assert (found.low, found.high) == pytest.approx((0.03, 0.05))
    assert found.p_value == pytest.approx(0.0202, abs=1e-4)
    assert found.is_distinguishable
    assert found.num_pairs == 3


def test_one_sign_is_not_enough_where_seeds_are_few():
    """Three differences of one sign are chance one time in four: the interval leaves 0 out, and the verdict does not follow it."""
    found = paired_difference([0.81, 0.84, 0.90], [0.80, 0.80, 0.80])
    assert found.low == pytest.approx(0.01)
    assert found.p_value > 0.05
    assert not found.is_distinguishable


def test_a_difference_that_changes_its_sign():
    found = paired_difference([0.84, 0.86, 0.80], [0.80, 0.83, 0.83])
    assert found.low < 0 < found.high
    assert not found.is_distinguishable


def test_seeds_are_paired_and_not_pooled():
    """What the seeds differ in by themselves is ten times what the methods differ in."""
    seeds = np.array([0.1, 0.5, 0.9])
    assert paired_difference(seeds + 0.02, seeds).is_distinguishable


def test_the_interval_narrows_with_the_pairs():
    rng = np.random.default_rng(0)
    few, many = (paired_difference(rng.normal(0.1, 1, n), np.zeros(n)) for n in (20, 2000))
    assert many.high - many.low < (few.high - few.low) / 5
    assert many.high - many.low == pytest.approx(2 * 1.96 / 2000**0.5, rel=0.1)


def test_one_pair_has_no_interval():
    found = paired_difference([1.0], [0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    assert not found.is_distinguishable


def test_equal_differences_are_certain():
    assert paired_difference([1.0, 2.0], [0.0, 1.0]).is_distinguishable
    assert not paired_difference([1.0, 2.0], [1.0, 2.0]).is_distinguishable


@pytest.mark.parametrize(("ours", "theirs"), [([], []), ([1.0], [1.0, 2.0])])
def test_what_cannot_be_paired(ours, theirs):
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference(ours, theirs)
