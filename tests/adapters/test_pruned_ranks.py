"""Masks that prune whole ranks make a smaller adapter, which computes the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Hira, Loha, Lora
from jaxpeft.pruning import apply_masks
from jaxpeft.trees import pattern_value

WIDTH = 6
PATHS = ("enc/query", "enc/value", "query")  # the last is the end of the first
KERNEL = jnp.asarray(tiny.normal(9, WIDTH, WIDTH))
METHODS = {
    "lora": Lora(rank=4, alpha=6.0),
    "rslora": Lora(rank=4, alpha=6.0, use_rslora=True, alpha_pattern={"value": 3.0}),
    "dora": Lora(rank=4, use_dora=True),
    "bias": Lora(rank=4, lora_bias=True, bias="all"),
    "patterns": Lora(rank=4, rank_pattern={"value": 2}),
    "hira": Hira(rank=4, rank_pattern={"value": 3}),
    "loha": Loha(rank=4, alpha=6.0, rank_pattern={"value": 2}),
}
PAIRS = {"loha": (("w1_b", "w1_a"), ("w2_b", "w2_a"))}


def adapter(method, seed=0):
    """Parameters of all layers, none of them zero."""
    sites = {}
    for i, path in enumerate(PATHS):
        rank = method.at(path).rank
        shapes = {"a": (WIDTH, rank), "b": (rank, WIDTH)}
        if isinstance(method, Loha):
            shapes = {f"w{j}_{side}": shape for j in (1, 2) for side, shape in zip("ba", shapes.values(), strict=True)}
        if getattr(method, "use_dora", False):
            shapes["m"] = (WIDTH,)
        if getattr(method, "lora_bias", False):
            shapes["bias"] = (WIDTH,)
        sites[path] = {
            name: jnp.asarray(tiny.normal(seed + 10 * i + j, *s)) for j, (name, s) in enumerate(shapes.items())
        }
    return sites


def rank_masks(sites, kept, pairs):
    """Masks that keep, at each path, the ranks `kept[path]` of every product."""

    def mask(params):
        def of(path):
            masks = {}
            for wide, tall in pairs:
                keep = np.isin(np.arange(params[path][wide].shape[1]), kept[path])
                masks[wide] = jnp.broadcast_to(keep, params[path][wide].shape)
                masks[tall] = jnp.broadcast_to(keep[:, None], params[path][tall].shape)
            return masks

        return of

    return {path: mask(sites)(path) for path in sites}


def shrunk(method, sites, masks):
    return method.without_pruned(apply_masks(sites, masks), masks)


def assert_same_kernels(before, after):
    """`(method, sites)` twice."""
    for path in PATHS:
        kernels = [method.at(path).kernel(KERNEL, sites[path]) for method, sites in (before, after)]
        np.testing.assert_allclose(kernels[1], kernels[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "kept",
    [{"enc/query": [0, 2, 3], "enc/value": [1], "query": []}, {key: [0, 1] for key in PATHS}],
    ids=["own", "same"],
)
def test_a_smaller_adapter_computes_the_same(name, kept):
    method = METHODS[name]
    sites = adapter(method)
    masks = rank_masks(sites, kept, PAIRS.get(name, (("a", "b"),)))
    smaller, left = shrunk(method, sites, masks)
    assert_same_kernels((method, apply_masks(sites, masks)), (smaller, left))
    for path in PATHS:
        own = smaller.at(path)
        assert own.rank == max(1, len(kept[path]))
        for wide, tall in PAIRS.get(name, (("a", "b"),)):
            chex.assert_shape(left[path][wide], (WIDTH, own.rank))
            chex.assert_shape(left[path][tall], (own.rank, WIDTH))
        if hasattr(method, "scaling"):
            assert own.scaling == pytest.approx(method.at(path).scaling, rel=1e-12)
    assert all(left["enc/query"][k] is v for k, v in apply_masks(sites, {})["enc/query"].items() if k in ("m", "bias"))


def test_layers_of_one_rank_need_no_patterns():
    method, sites = METHODS["lora"], adapter(METHODS["lora"])
    smaller, _ = shrunk(method, sites, rank_masks(sites, {key: [1, 3] for key in PATHS}, (("a", "b"),)))
    assert (smaller.rank, smaller.alpha, smaller.rank_pattern, smaller.alpha_pattern) == (2, 3.0, {}, {})


def test_a_longer_name_comes_before_its_end():
    method, sites = METHODS["lora"], adapter(METHODS["lora"])
    kept = {"enc/query": [0, 1, 2], "enc/value": [0, 1, 2, 3], "query": [0]}
    smaller, _ = shrunk(method, sites, rank_masks(sites, kept, (("a", "b"),)))
    assert list(smaller.rank_pattern.items()) == [("enc.query", 3), ("enc.value", 4), ("query", 1)]
    assert [pattern_value(smaller.rank_pattern, path, 0) for path in PATHS] == [3, 4, 1]
    assert dict(smaller.alpha_pattern) == {"enc.query": 4.5, "enc.value": 6.0, "query": 1.5}


def test_a_rank_with_one_side_pruned_adds_nothing():
    method, sites = Lora(rank=4), adapter(Lora(rank=4))
    masks = {path: {"b": jnp.ones((4, WIDTH), bool).at[1].set(False)} for path in PATHS}
    smaller, left = shrunk(method, sites, masks)
    assert smaller == Lora(rank=3, alpha=6.0)
    np.testing.assert_array_equal(left["query"]["a"], sites["query"]["a"][:, jnp.array([0, 2, 3])])


def test_loha_has_as_many_ranks_as_its_fuller_product():
    method = Loha(rank=4, alpha=4.0)
    sites = adapter(method)
    masks = rank_masks(sites, {key: [0, 1, 3] for key in PATHS}, (("w1_b", "w1_a"),))
    second = rank_masks(sites, {**{key: [2] for key in PATHS}, "query": []}, (("w2_b", "w2_a"),))
    masks = {path: {**masks[path], **second[path]} for path in PATHS}
    smaller, left = shrunk(method, sites, masks)
    assert [smaller.at(path).rank for path in PATHS] == [3, 3, 1]  # without a second product there is no update
    assert_same_kernels((method, apply_masks(sites, masks)), (smaller, left))
    assert not left["enc/query"]["w2_b"][:, 1:].any()


def test_masks_that_empty_no_rank_change_nothing():
    sites = adapter(METHODS["lora"])
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool).at[0].set(False).at[-1].set(True), sites)
    masks = {path: {**group, "b": jnp.ones((4, WIDTH), bool)} for path, group in masks.items()}
    masked = apply_masks(sites, masks)
    method, left = METHODS["lora"].without_pruned(masked, masks)
    assert method is METHODS["lora"]
    assert left is masked


def test_a_base_adjusted_to_the_rank_keeps_it():
    method = Lora(rank=4, init_lora_weights="pissa")
    sites = adapter(method)
    masks = rank_masks(sites, {key: [0] for key in PATHS}, (("a", "b"),))
    assert shrunk(method, sites, masks)[0] is method


def test_an_odd_rank_is_not_initialised_orthogonally():
    method = Lora(rank=4, init_lora_weights="orthogonal")
    sites = adapter(method)
    for kept in ([0, 1, 2], [0, 1, 2, 3]):
        smaller, _ = shrunk(method, sites, rank_masks(sites, dict.fromkeys(PATHS, kept), (("a", "b"),)))
        assert smaller.init_lora_weights == ("orthogonal" if len(kept) == 4 else True)
