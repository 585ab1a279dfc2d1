"""Units by hand, on small matrices: what is one, how it scores, and how many are kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.adapters.entry_effects import of_product
from jaxpeft.errors import InputError
from jaxpeft.pruning import Pruner, Selection, magnitude, structure_of, tighten
from jaxpeft.pruning.scores import product, random
from jaxpeft.pruning.structures import Blocks, Elements, Groups, Ranks


def layer(**tensors):
    return {"x": {name: jnp.asarray(value, jnp.float32) for name, value in tensors.items()}}


def masked(sites, sparsity, selection, criterion=magnitude):
    counts = selection.counts(sites, sparsity)
    masks = tighten({}, criterion(sites, effects=of_product), counts, selection=selection, combine=criterion.combine)
    return {name: np.asarray(mask).astype(int).tolist() for name, mask in masks["x"].items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("element", Elements()),
        ("2:4", Groups(2, 4)),
        ("1:16", Groups(1, 16)),
        ("8x8", Blocks(8, 8)),
        ("1x16", Blocks(1, 16)),
        ("rank", Ranks((("a", "b"),))),
    ],
)
def test_a_flag_names_a_structure(text, expected):
    assert structure_of(text, (("a", "b"),)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:4", r"pruning\.structure '4:4' keeps 4 of 4 entries, which prunes none"),
        ("rank", r"pruning\.structure rank needs a method with low-rank products"),
        ("row", r"pruning\.structure is 'row'; it must be one of element, rank, 2:4"),
        ("0:4", r"pruning\.structure is '0:4'"),
        ("0x4", r"pruning\.structure is '0x4'"),
    ],
)
def test_a_text_that_names_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        structure_of(text)


def test_two_of_four_along_the_axis_that_is_summed_over():
    """Down the columns of [d_in, r]: rows are the inputs. Ties keep the lower row."""
    a = [[1, 5], [2, 5], [3, 5], [4, 5], [8, 1], [7, 2], [6, 3], [5, 4]]
    expected = [[0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]]
    assert masked(layer(a=a), 0.5, Selection(("a",), Groups(2, 4))) == {"a": expected}


def test_groups_tighten_to_n_and_no_further():
    """On the way a group keeps max(n, round(m·(1 − s))) entries: 4, 3, 2, and 2 of 4."""
    selection, sites = Selection(("a",), Groups(2, 4)), layer(a=np.arange(8.0).reshape(8, 1))
    counts = [selection.counts(sites, sparsity)["x"]["a"] for sparsity in (0.0, 0.25, 0.5, 0.9)]
    assert counts == [4, 3, 2, 2]


def test_an_axis_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"2:4 needs an axis that 4 divides, and 'b' of layer x sums over 6"):
        Selection(None, Groups(2, 4)).counts(layer(a=np.ones((8, 6)), b=np.ones((6, 8))), 0.5)


def test_blocks_and_the_blocks_at_the_edges():
    """A 3 × 3 matrix in 2 × 2 blocks: means 1, 3, 2 and 4, although the sums are 4, 6, 4 and 4."""
    a = [[1, 1, 3], [1, 1, 3], [2, 2, 4]]
    assert masked(layer(a=a), 0.5, Selection(None, Blocks(2, 2))) == {"a": [[0, 0, 1], [0, 0, 1], [0, 0, 1]]}
    assert masked(layer(a=a), 0.25, Selection(None, Blocks(2, 2))) == {"a": [[0, 0, 1], [0, 0, 1], [1, 1, 1]]}


def test_whole_ranks_by_the_product_of_their_norms():
    """‖a_k‖·‖b_k‖ = 3, 4, 2: the middle one has the smallest column of A and stays all the same."""
    a, b = [[3, 1, 2], [0, 0, 0]], [[1, 0], [0, 4], [1, 0]]
    expected = {"a": [[0, 1, 0]] * 2, "b": [[0, 0], [1, 1], [0, 0]]}
    selection = Selection(("a", "b"), Ranks((("a", "b"),)))
    assert masked(layer(a=a, b=b), 0.5, selection) == {
        "a": [[1, 1, 0]] * 2,
        "b": [[1, 1], [1, 1], [0, 0]],
    }  # round(1.5) = 2
    assert masked(layer(a=a, b=b), 0.7, selection) == expected
    assert masked(layer(a=a, b=b), 0.7, selection, product) == expected  # its norms are the squares


def test_a_rank_sums_the_scores_of_a_criterion_that_says_so():
    scores = layer(a=[[1, 0, 5], [1, 0, 0]], b=[[0, 0], [4, 4], [0, 0]])
    units = Selection(("a", "b"), Ranks((("a", "b"),))).units(scores, "sum")
    np.testing.assert_array_equal(units["x"]["a·b"], [2, 8, 5])


SITES = {
    "x": {"a": jnp.array([[1.0, 2.0, 3.0, 4.0]]), "b": jnp.array([[10.0, 20.0]])},
    "y": {"a": jnp.array([[0.1, 0.2, 0.3, 0.4]]), "b": jnp.array([[0.01, 0.02]])},
}


def kept_in(scope, sparsity):
    """Counts, and which of SITES's entries stay, as if their magnitudes had a common unit."""
    selection = Selection(None, scope=scope)
    counts = selection.counts(SITES, sparsity)
    masks = tighten({}, magnitude(SITES), counts, selection=selection)
    return counts, {path: {k: m.astype(int)[0].tolist() for k, m in group.items()} for path, group in masks.items()}


def test_entries_compete_in_their_scope():
    counts, masks = kept_in("layer", 0.5)
    assert counts == {"x": {"all": 3}, "y": {"all": 3}}
    assert masks == {"x": {"a": [0, 0, 0, 1], "b": [1, 1]}, "y": {"a": [0, 0, 1, 1], "b": [0, 1]}}
    counts, masks = kept_in("global", 0.5)
    assert counts == {"all": {"all": 6}}
    assert masks == {"x": {"a": [0, 0, 1, 1], "b": [1, 1]}, "y": {"a": [0, 0, 0, 1], "b": [0, 1]}}


def test_no_tensor_loses_all_of_its_entries():
    """Not even where the sparsity asks for fewer entries than there are tensors."""
    counts, masks = kept_in("global", 0.99)
    assert counts == {"all": {"all": 4}}
    assert masks == {"x": {"a": [0, 0, 0, 1], "b": [0, 1]}, "y": {"a": [0, 0, 0, 1], "b": [0, 1]}}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitudes_of_different_tensors_are_not_compared(scope):
    """(A/c, cB) is the same adapter; c would decide which of the two is pruned."""
    with pytest.raises(InputError, match=rf"pruning\.scope {scope} compares scores of different tensors"):
        Pruner(magnitude, Selection(("a", "b"), scope=scope), of_product)
    for criterion in (product, random):
        Pruner(criterion, Selection(("a", "b"), scope=scope), of_product)
    Pruner(magnitude, Selection(("a", "b"), Ranks((("a", "b"),)), scope), of_product)  # ‖a_k‖·‖b_k‖ has a unit


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(InputError, match=r"pruning\.scope layer has no meaning for n:m sparsity"):
        Selection(None, Groups(2, 4), "layer")
    with pytest.raises(InputError, match=r"pruning\.scope is 'model'; it must be one of tensor, layer, global"):
        Selection(None, scope="model")
    with pytest.raises(
        InputError, match=r"pruning\.criterion product needs a method that says how its entries change the update"
    ):
        Pruner(product)
