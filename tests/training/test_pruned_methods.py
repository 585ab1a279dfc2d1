"""Methods besides LoRA are pruned while they train: zeros stay zeros, and the file computes what was trained."""

import jax
import numpy as np
import pytest
import tiny
from tiers import slow_but

from jaxpeft.adapters import Loha, Lokr, S2ft, Sora
from jaxpeft.inject import apply
from jaxpeft.pruning import Pruner, Selection, apply_masks, sparsity_of, structure_of
from jaxpeft.pruning.scores import product
from jaxpeft.training.step import make_train_step, prune_step

RUNS = {
    "loha": (Loha(rank=4, alpha=6.0), "rank"),
    "lokr": (Lokr(rank=2), "rank"),
    "sora": (Sora(rank=4), "2x2"),
    "s2ft": (S2ft(channels=6), "1x8"),
}


@pytest.mark.parametrize("name", slow_but(RUNS, "loha", "lokr"))
def test_pruned_entries_stay_zero_and_the_smaller_layer_computes_the_same(name):
    """Entries of all layers by the product-aware score, then whole units of every tensor by the same."""
    method, structure = RUNS[name]
    toy = tiny.Toy()
    toy.module = tiny.Toy.Module(dropout=0.0)
    objective, optimizer, frozen, state = tiny.training(toy, method, weight_decay=0.1, max_grad_norm=0.5, pruned=True)
    step = make_train_step(objective, optimizer)
    for i, (text, scope) in enumerate((("element", "global"), (structure, "tensor"))):
        for j in range(2):
            state, _ = step(state, frozen, tiny.batch(seed=2 * i + j))
        selection = Selection(method.prunable, structure_of(text, method.products), scope)
        counts = selection.counts(state.adapters["sites"], (0.2, 0.5)[i])
        state = prune_step(state, counts, pruner=Pruner(product, selection, type(method).entry_effects))
    pruned = tiny.snapshot(state.masks)
    for i in range(3):
        state, _ = step(state, frozen, tiny.batch(seed=9 + i))
    sites = state.adapters["sites"]
    for path, masks in pruned.items():
        for key, mask in masks.items():
            value = np.asarray(sites[path][key])
            assert not value[~mask].any()
            assert mask.any()
            assert mask.all() or key in method.prunable
    assert sparsity_of(pruned) > 0.3  # a LoKr's W₁ and a SoRA's gate have no units
    smaller, left = method.without_pruned(apply_masks(sites, state.masks), state.masks)
    if structure == "rank":
        assert {smaller.at(path).rank for path in left} == {method.rank // 2}
        assert sum(leaf.size for leaf in jax.tree.leaves(left)) < sum(leaf.size for leaf in jax.tree.leaves(sites))
    ids = tiny.batch()["input_ids"]
    before = apply(toy.module, frozen, state.adapters, method, masks=state.masks, input_ids=ids).logits
    after = apply(toy.module, frozen, {**state.adapters, "sites": left}, smaller, input_ids=ids).logits
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
