"""The zeros of a pruned base: found, kept, and their cost by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.pruning.base_zeros import KeptZeros, cost_of_zeros, dropped_in_total, keep_zeros, n_of_m


def sparse(n, m, *, rows=32, columns=12, seed=0):
    """A kernel `[rows, columns]` with exactly n of m consecutive inputs of an output that are not zero."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(m), (rows // m, columns, 1)), axis=-1)
    return tiny.normal(seed, rows, columns) * (order < n).transpose(0, 2, 1).reshape(rows, columns)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (2, 8), (4, 16), (16, 32)])
def test_n_of_m_is_found_along_the_inputs(pattern):
    kernel = sparse(*pattern)
    assert n_of_m(kernel) == pattern
    # Along the outputs the zeros are at random. With the wrong axis, nothing would be found, or something by chance.
    assert n_of_m(sparse(*pattern, rows=64, columns=32).T) is None


def test_what_is_no_pattern():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5, 0.9, 0.95):
        assert n_of_m(np.where(rng.random((64, 64)) < share, 0, 1)) is None
    assert n_of_m(np.zeros((8, 8))) is None
    assert n_of_m(np.ones((8, 8))) is None
    assert n_of_m(sparse(2, 4)[:-1]) is None  # 31 inputs are no groups of 4


def test_a_stray_zero_more_is_still_the_pattern():
    kernel = sparse(2, 4)
    kernel[np.nonzero(kernel)[0][0]] = 0
    assert n_of_m(kernel) == (2, 4)


def test_the_cost_by_hand():
    base = jnp.array([[0.0, 2.0], [1.0, 0.0]])
    merged = jnp.array([[3.0, 2.0], [1.0 + 12.0, 4.0]])
    cost = cost_of_zeros(base, merged)
    assert cost == KeptZeros(zeros=0.5, pattern=None, update_norm=13.0, dropped_norm=5.0)
    assert cost.dropped == 5 / 13
    np.testing.assert_array_equal(keep_zeros(base, merged), [[0, 2], [13, 0]])
    free = KeptZeros(0.5, None, 0.0, 0.0)
    assert free.dropped == 0
    assert dropped_in_total([cost, free, cost]) == pytest.approx(5 / 13)
    assert dropped_in_total([]) == dropped_in_total([free]) == 0
