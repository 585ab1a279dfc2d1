"""Laws of sparsity: packed files, smaller adapters, records of masks, and the zeros of a pruned base."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxpeft.adapters import Hira, Lora
from jaxpeft.interop.peft.packed import pack, unpack
from jaxpeft.pruning import apply_masks, prune
from jaxpeft.pruning.base_zeros import cost_of_zeros, keep_zeros
from jaxpeft.pruning.record import mask_record

SEEDS = st.integers(0, 99)


@given(
    arrays.arrays(
        st.sampled_from([np.float16, np.float32, np.int8]),
        arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.sampled_from([0, 0, 0, 1, -3]),
    ),
    st.booleans(),
)
def test_what_is_packed_comes_back_exactly(tensor, transposed):
    tensors = {"x": tensor.T if transposed else tensor, "y": tiny.normal(0, 3)}
    again = unpack(*pack(tensors), "file")
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        assert (again[key].dtype, again[key].shape, again[key].tobytes()) == (value.dtype, value.shape, value.tobytes())


@given(st.booleans(), st.booleans(), st.floats(0.3, 0.95), SEEDS)
def test_whatever_is_pruned_the_smaller_adapter_computes_the_same(is_lora, rank_stabilised, sparsity, seed):
    method = Lora(rank=4, alpha=6.0, use_rslora=rank_stabilised) if is_lora else Hira(rank=4)
    sites = {
        path: {"a": tiny.normal(seed + i, 6, 4), "b": tiny.normal(seed + 9 + i, 4, 6)} for i, path in enumerate("xy")
    }
    masks = prune(sites, sparsity)
    masked = apply_masks(sites, masks)
    smaller, left = method.without_pruned(masked, masks)
    kernel = tiny.normal(5, 6, 6)
    for path in sites:
        before, after = method.at(path).kernel(kernel, masked[path]), smaller.at(path).kernel(kernel, left[path])
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
        assert left[path]["a"].shape == (6, smaller.at(path).rank)


@given(st.floats(0, 0.95), st.floats(0, 0.95), SEEDS)
def test_what_changed_between_nested_masks_is_the_difference_of_their_sizes(first, second, seed):
    sites = {f"l/{i}/q": {"a": tiny.normal(seed + i, 6, 2), "b": tiny.normal(seed + 9 + i, 2, 6)} for i in range(2)}
    masks, before = prune(sites, first), prune(sites, second)
    record, old = mask_record(1, masks, before), mask_record(1, before, {})
    assert record["churn"] == pytest.approx(abs(sum(record["kept"].values()) - sum(old["kept"].values())) / 48)
    assert record["size"] == dict.fromkeys(record["kept"], 12)
    assert all(0 <= left <= 2 for left in record["ranks"].values())


@given(SEEDS, st.floats(0, 1))
def test_what_is_kept_and_what_is_dropped_make_the_update(seed, share):
    base = np.where(np.random.default_rng(seed).random((8, 6)) < share, 0, tiny.normal(seed, 8, 6))
    merged = base + tiny.normal(seed + 1, 8, 6)
    kept = np.asarray(keep_zeros(base, jnp.asarray(merged)))
    assert not kept[base == 0].any()
    np.testing.assert_array_equal(kept[base != 0], merged[base != 0])
    cost = cost_of_zeros(base, merged)
    assert math.hypot(np.linalg.norm((merged - base)[base != 0]), cost.dropped_norm) == pytest.approx(cost.update_norm)
    assert cost.zeros == (base == 0).mean()
