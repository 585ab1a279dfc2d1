"""What an entry contributes to a method's update: beside setting it to zero, for every entry of every method."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.adapters import METHODS, Hira, Loha, Lokr, Lora, S2ft, Site, Sora
from jaxpeft.pruning import Pruner, Selection, prune, structure_of
from jaxpeft.pruning.scores import magnitude, product

SITE = Site("layer", 8, 6)


def factor(params, name):
    return params[name] if name in params else params[f"{name}_b"] @ params[f"{name}_a"]


def hadamard(params):
    return factor(params, "w1") * factor(params, "w2")


def kronecker(params):
    return np.kron(factor(params, "w1"), factor(params, "w2"))


CASES = {
    "lora": (Lora(rank=3), lambda p: p["a"] @ p["b"]),
    "dora": (Lora(rank=3, use_dora=True), lambda p: p["a"] @ p["b"]),
    "hira": (Hira(rank=3), lambda p: p["a"] @ p["b"]),
    "sora": (Sora(rank=3), lambda p: (p["a"] * p["g"]) @ p["b"]),
    "loha": (Loha(rank=3), hadamard),
    "lokr": (Lokr(rank=1), kronecker),  # W₁ [2, 2] whole, W₂ [4, 3] of rank 1
    "lokr, W₁ decomposed": (Lokr(rank=2, decompose_both=True, decompose_factor=8), kronecker),
    "lokr, both decomposed": (Lokr(rank=1, decompose_both=True, decompose_factor=4), kronecker),
    "lokr, both whole": (Lokr(rank=4), kronecker),
    "s2ft": (S2ft(channels=4), lambda p: p["delta"]),
}


def drawn(method, site=SITE):
    return {name: tiny.normal(i, *shape) for i, (name, shape) in enumerate(method.shapes(site).items())}


def effects_of(method, params):
    found = type(method).entry_effects({name: jnp.asarray(value) for name, value in params.items()})
    return {name: np.asarray(value) for name, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_effect_is_the_norm_of_what_the_update_loses(name):
    """Every entry of every pruned parameter is set to zero in turn."""
    method, update = CASES[name]
    params = drawn(method)
    effects = effects_of(method, params)
    exact = {key: value.astype(np.float64) for key, value in params.items()}
    whole = update(exact)
    pruned = params.keys() & set(method.prunable)
    assert effects.keys() == params.keys() >= pruned != set()
    for key in pruned:
        expected = np.empty(params[key].shape)
        for index in np.ndindex(*expected.shape):
            without = exact[key].copy()
            without[index] = 0
            expected[index] = np.linalg.norm(whole - update({**exact, key: without}))
        np.testing.assert_allclose(effects[key], expected, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, (method, _) in CASES.items() if method.products])
def test_a_rank_scores_what_the_update_loses_with_it(name):
    """The norms of the effects, over column k of L as over row k of R, are the norm of what goes with rank k."""
    method, update = CASES[name]
    params, structure = drawn(method), structure_of("rank", method.products)
    if name == "lokr, both whole":
        assert structure.size({key: value.shape for key, value in params.items()}) == {}
        return
    sites = {"x": {key: jnp.asarray(value) for key, value in params.items()}}
    selection = Selection(method.prunable, structure)
    units = selection.units(product(sites, effects=type(method).entry_effects), product.combine)["x"]
    exact = {key: value.astype(np.float64) for key, value in params.items()}
    assert units.keys() == {f"{wide}·{tall}" for wide, tall in method.products if wide in params}
    for wide, tall in (label.split("·") for label in units):
        lost = []
        for k in range(params[wide].shape[1]):
            keep = np.arange(params[wide].shape[1]) != k
            left = {**exact, wide: exact[wide] * keep, tall: exact[tall] * keep[:, None]}
            lost.append(np.linalg.norm(update(exact) - update(left)) ** 2)
        np.testing.assert_allclose(units[f"{wide}·{tall}"], lost, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["lora", "sora", "loha", "lokr", "lokr, both decomposed"]),
    st.lists(st.integers(-6, 6), min_size=3, max_size=3),
)
def test_factors_that_are_rescaled_against_each_other_have_the_same_effects(name, powers):
    """Powers of two, so that nothing is rounded; the last factor takes back what the others got."""
    method, _ = CASES[name]
    params = drawn(method)
    powers = powers[: len(params) - 1]
    scales = [2.0**power for power in (*powers, -sum(powers))]
    scaled = {key: value * np.float32(scale) for (key, value), scale in zip(params.items(), scales, strict=True)}
    before, after = effects_of(method, params), effects_of(method, scaled)
    for key in method.prunable:
        if key in params:
            np.testing.assert_allclose(after[key], before[key], rtol=1e-5)


def test_every_method_that_can_be_pruned_has_effects():
    assert [name for name, kind in METHODS.items() if kind.prunable and kind.entry_effects is None] == []
    assert {name for name, kind in METHODS.items() if kind.products} == {"lora", "hira", "loha", "lokr"}


def test_entries_of_all_tensors_of_a_method_compete():
    """LoHa's in one layer, by the product-aware score; magnitudes have no common unit, not even those of whole ranks."""
    method = Loha(rank=2)
    sites = {"x": {key: jnp.asarray(value) for key, value in drawn(method).items()}}
    masks = prune(sites, 0.5, criterion="product", effects=Loha.entry_effects)["x"]
    effects = effects_of(method, sites["x"])
    for key, mask in masks.items():
        assert effects[key][mask].min() >= effects[key][~mask].max()
    ranks = Selection(Loha.prunable, structure_of("rank", Loha.products), "global")
    Pruner(product, ranks, Loha.entry_effects)
    with pytest.raises(ValueError, match=r"pruning\.scope global compares scores of different tensors"):
        Pruner(magnitude, ranks)
