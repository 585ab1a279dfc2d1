"""Structures, scopes and rewiring on any values: counts hold exactly, groups and blocks are whole, and a rescaled pair stays the same."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxpeft.adapters.entry_effects import of_product
from jaxpeft.pruning import Pruner, Selection, apply_masks, num_kept
from jaxpeft.pruning.rewire import rewired_by_gradient
from jaxpeft.pruning.scores import magnitude, product
from jaxpeft.pruning.structures import Blocks, Groups, Ranks
from jaxpeft.pruning.updates import Moment, Pruned, tightened

# One set of shapes, so that each program is compiled once. Whole numbers and few of them, so that there are ties.
SHAPES = {"x": {"a": (8, 4), "b": (4, 6)}, "y": {"a": (12, 4), "b": (4, 5)}}
VALUES = st.integers(-3, 3).map(np.float32)
SPARSITIES = st.floats(0.01, 0.99)
BOTH, KEY = ("a", "b"), jax.random.key(0)


def trees(elements=VALUES):
    return st.fixed_dictionaries(
        {
            path: st.fixed_dictionaries({k: arrays(np.float32, shape, elements=elements) for k, shape in group.items()})
            for path, group in SHAPES.items()
        }
    )


def compiled(change, pruner):
    @jax.jit
    def run(sites, masks, memory, counts, fraction):
        return change(Pruned(sites, masks, memory), Moment(counts, {"fraction": fraction}, KEY), pruner)

    return run


PRUNERS = {
    "2:4": Pruner(magnitude, Selection(BOTH, Groups(2, 4)), of_product),
    "blocks": Pruner(magnitude, Selection(BOTH, Blocks(3, 4)), of_product),
    "ranks": Pruner(magnitude, Selection(BOTH, Ranks((BOTH,)), "global"), of_product),
    "layer": Pruner(product, Selection(BOTH, scope="layer"), of_product),
    "global": Pruner(product, Selection(BOTH, scope="global"), of_product),
}
TIGHTEN = {name: compiled(tightened, pruner) for name, pruner in PRUNERS.items()}
REWIRE = {name: compiled(rewired_by_gradient, PRUNERS[name]) for name in ("blocks", "global", "layer")}
ALL_KEPT = jax.tree.map(lambda shape: np.ones(shape, bool), SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def pruned(name, tree, sparsity, masks=None):
    counts = PRUNERS[name].selection.counts(tree, sparsity)
    after = TIGHTEN[name](tree, masks or ALL_KEPT, {}, counts, 0.0)
    return jax.tree.map(np.asarray, after.masks)


@settings(max_examples=30, deadline=None)
@given(trees())
def test_every_group_of_four_keeps_two(tree):
    for mask in jax.tree.leaves(pruned("2:4", tree, 0.5)):
        np.testing.assert_array_equal(mask.reshape(-1, 4, mask.shape[1]).sum(1), 2)


@settings(max_examples=30, deadline=None)
@given(trees(), SPARSITIES)
def test_blocks_are_whole_and_their_number_exact(tree, sparsity):
    for group in pruned("blocks", tree, sparsity).values():
        for mask in group.values():
            blocks = mask[::3, ::4]
            whole = np.repeat(np.repeat(blocks, 3, 0), 4, 1)[: mask.shape[0], : mask.shape[1]]
            np.testing.assert_array_equal(mask, whole)
            assert blocks.sum() == num_kept(blocks.size, sparsity)


@settings(max_examples=30, deadline=None)
@given(trees(), SPARSITIES)
def test_ranks_are_whole_and_every_layer_keeps_one(tree, sparsity):
    ranks = []
    for group in pruned("ranks", tree, sparsity).values():
        np.testing.assert_array_equal(group["a"], np.broadcast_to(group["a"][0], group["a"].shape))
        np.testing.assert_array_equal(group["b"], np.broadcast_to(group["a"][0][:, None], group["b"].shape))
        ranks.append(int(group["a"][0].sum()))
    assert min(ranks) >= 1
    assert sum(ranks) == max(2, num_kept(8, sparsity))


@settings(max_examples=30, deadline=None)
@given(trees(), SPARSITIES)
def test_counts_of_a_scope_are_exact_and_no_tensor_is_empty(tree, sparsity):
    for name in ("layer", "global"):
        masks = pruned(name, tree, sparsity)
        assert all(mask.any() for mask in jax.tree.leaves(masks))
        kept = {path: sum(int(mask.sum()) for mask in group.values()) for path, group in masks.items()}
        sizes = {path: sum(mask.size for mask in group.values()) for path, group in masks.items()}
        if name == "layer":
            assert kept == {path: max(2, num_kept(size, sparsity)) for path, size in sizes.items()}
        else:
            assert sum(kept.values()) == max(4, num_kept(sum(sizes.values()), sparsity))


@settings(max_examples=30, deadline=None)
@given(trees(), trees(), st.lists(SPARSITIES, min_size=2, max_size=3), st.sampled_from(sorted(set(PRUNERS) - {"2:4"})))
def test_masks_only_tighten_in_every_scope_and_structure(tree, other, sparsities, name):
    masks = None
    for i, sparsity in enumerate(sorted(sparsities)):
        tighter = pruned(name, other if i % 2 else tree, sparsity, masks)
        if masks:
            assert not any(jax.tree.leaves(jax.tree.map(lambda new, old: (new & ~old).any(), tighter, masks)))
        masks = tighter


@settings(max_examples=30, deadline=None)
@given(trees(), SPARSITIES, st.sampled_from([0.25, 2.0, 64.0]), st.sampled_from(["layer", "global", "ranks"]))
def test_a_rescaled_pair_has_the_same_masks(tree, sparsity, c, name):
    """(A/c, cB) is the same adapter, also among scores that compete between tensors. Powers of two scale without rounding."""
    scaled = {path: {"a": group["a"] / c, "b": group["b"] * c} for path, group in tree.items()}
    for mask, again in zip(
        jax.tree.leaves(pruned(name, tree, sparsity)), jax.tree.leaves(pruned(name, scaled, sparsity)), strict=True
    ):
        np.testing.assert_array_equal(mask, again)


@settings(max_examples=30, deadline=None)
@given(trees(), trees(), SPARSITIES, st.floats(0, 0.99), st.sampled_from(sorted(REWIRE)))
def test_rewiring_keeps_the_count(tree, gradient, sparsity, fraction, name):
    masks = pruned(name, tree, sparsity)
    counts = PRUNERS[name].selection.counts(tree, sparsity)
    sites = jax.tree.map(np.asarray, apply_masks(tree, masks))
    after = REWIRE[name](sites, masks, {"gradient": gradient}, counts, jnp.float32(fraction))
    structure = PRUNERS[name].selection.structure

    def units(tree):
        covered = {path: structure.covered(jax.tree.map(jnp.asarray, group)) for path, group in tree.items()}
        return sum(int(unit.sum()) for unit in jax.tree.leaves(covered))

    assert units(after.masks) == units(masks)
    assert all(np.asarray(mask).any() for mask in jax.tree.leaves(after.masks))
    # A weight that is not zero was kept before and is kept now.
    alive = jax.tree.map(lambda value: np.asarray(value) != 0, after.sites)
    assert not any(
        jax.tree.leaves(
            jax.tree.map(lambda a, old, new: (a & ~(old & np.asarray(new))).any(), alive, masks, after.masks)
        )
    )
