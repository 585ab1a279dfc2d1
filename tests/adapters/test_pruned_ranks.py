"""Masks that prune whole ranks make a smaller adapter, which computes the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Hira, Loha, Lokr, Lora, Site
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.interop.peft.files import BaseInfo, load_adapter, save_adapter
from jaxpeft.pruning import Selection, apply_masks, structure_of
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


KRONECKER = Site("enc/query", 64, 64)  # W₁ and W₂ are 8 × 8


@pytest.mark.parametrize(
    ("method", "kept", "rank"),
    [
        (Lokr(rank=3, alpha=6.0), 1, 1),
        (Lokr(rank=3, alpha=6.0), 0, 1),
        (Lokr(rank=3, alpha=6.0, decompose_both=True), 2, 2),
        # W₁ is 2 × 2 and whole, and is decomposed below rank 1; W₂ is 32 × 32.
        (Lokr(rank=3, alpha=6.0, decompose_both=True, decompose_factor=2), 1, 1),
        # W₁ is 16 × 16 and W₂ 4 × 4. Rank 3 decomposes W₁ only, and rank 1 would decompose W₂ too.
        (Lokr(rank=3, alpha=6.0, decompose_both=True, decompose_factor=16), 1, 2),
        (Lokr(rank=3, alpha=6.0, decompose_both=True, decompose_factor=16), 3, 3),
    ],
)
def test_lokr_keeps_the_ranks_that_its_factors_need(method, kept, rank):
    """The rank says which factors are decomposed, so a smaller one must not decompose more of them."""
    sites = {
        KRONECKER.path: {
            k: jnp.asarray(tiny.normal(i, *s)) for i, (k, s) in enumerate(method.shapes(KRONECKER).items())
        }
    }
    pairs = [pair for pair in Lokr.products if pair[0] in sites[KRONECKER.path]]
    masks = rank_masks(sites, {KRONECKER.path: range(kept)}, pairs)
    smaller, left = shrunk(method, sites, masks)
    own, params = smaller.at(KRONECKER.path), left[KRONECKER.path]
    assert own.rank == rank
    assert own.scaling == pytest.approx(method.scaling, rel=1e-12)
    assert own.shapes(KRONECKER) == {key: leaf.shape for key, leaf in params.items()}
    kernel = jnp.asarray(tiny.normal(9, 64, 64))
    whole = method.kernel(kernel, apply_masks(sites, masks)[KRONECKER.path])
    np.testing.assert_allclose(own.kernel(kernel, params), whole, rtol=1e-6, atol=1e-6)


def test_a_lokr_layer_without_a_product_keeps_its_rank_and_is_refused_by_rank_pruning():
    """W₁ and W₂ of a layer of 16 × 16 are 4 × 4, too small for rank 3; a second layer is decomposed."""
    method, small = Lokr(rank=3, alpha=6.0), Site("small", 16, 16)
    shapes = {site.path: method.shapes(site) for site in (KRONECKER, small)}
    sites = {path: {k: jnp.asarray(tiny.normal(1, *s)) for k, s in own.items()} for path, own in shapes.items()}
    pair = ("w2_b", "w2_a")
    masks = rank_masks({KRONECKER.path: sites[KRONECKER.path]}, {KRONECKER.path: [2]}, [pair])
    smaller, left = shrunk(method, sites, masks)
    assert (smaller.at(KRONECKER.path).rank, smaller.at("small").rank) == (1, 3)
    assert left["small"]["w1"] is sites["small"]["w1"]
    selection = Selection(Lokr.prunable, structure_of("rank", Lokr.products))
    assert selection.counts({KRONECKER.path: sites[KRONECKER.path]}, 0.5) == {KRONECKER.path: {"w2_b·w2_a": 2}}
    with pytest.raises(
        InputError, match=r"layer small has none, .*'w1' \[4, 4\] and 'w2' \[4, 4\] are whole; lower adapter\.rank"
    ):
        selection.counts(sites, 0.5)


@pytest.mark.parametrize("method", [Loha(rank=4, alpha=6.0), Lokr(rank=3, alpha=6.0)], ids=["loha", "lokr"])
def test_the_file_of_a_pruned_adapter_computes_the_same(method, bert, tmp_path):
    """Layers keep different numbers of ranks; a LoHa's products too, and the fuller one counts."""
    frozen, adapters = tiny.adapted(bert, method)
    masks = {}
    for i, (path, params) in enumerate(adapters["sites"].items()):
        for j, pair in enumerate(pair for pair in method.products if pair[0] in params):
            masks.setdefault(path, {}).update(rank_masks({path: params}, {path: range((i + j) % 3)}, [pair])[path])
    save_adapter(tmp_path, adapters, method, base=BaseInfo.of(bert), masks=masks)
    loaded, again, smaller = load_adapter(tmp_path, bert.params)
    assert len({smaller.at(path).rank for path in again["sites"]}) > 1
    assert max(smaller.at(path).rank for path in again["sites"]) < method.rank
    inputs = bert.inputs(tiny.batch())
    expected = apply(bert.module, frozen, adapters, method, masks=masks, **inputs).logits
    found = apply(bert.module, loaded, again, smaller, **inputs).logits
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
