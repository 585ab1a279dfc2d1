"""PEFT's files of any adapter: what was saved is what is loaded, bit for bit, whatever its layers, ranks and options."""

import tempfile
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft import BaseInfo, init_adapters, load_adapter, save_adapter
from jaxpeft.adapters import Hira, Ia3, Loha, Lora, Site
from jaxpeft.pruning import apply_masks, prune
from jaxpeft.trees import leaf_paths

BASE = BaseInfo("somewhere/base", "BertModel", "bert", None)
# Few, for every tree of other shapes is compiled again.
SIZES = {"query": (8, 3), "key": (3, 8), "value": (8, 8), "dense": (3, 3)}
RANKS = st.integers(1, 2)


@st.composite
def bases(draw):
    """`(params, sites)` of two to four layers of different sizes; some without a bias."""
    names = draw(st.lists(st.sampled_from([*SIZES]), min_size=2, max_size=4, unique=True))
    params, sites = {}, {}
    for i, name in enumerate(names):
        d_in, d_out = SIZES[name]
        params[name] = {"kernel": np.full((d_in, d_out), i + 1, np.float32)}
        if draw(st.booleans()):
            params[name]["bias"] = np.zeros(d_out, np.float32)
        sites[f"enc/{name}"] = Site(f"enc/{name}", d_in, d_out)
    return {"enc": params}, sites


@st.composite
def methods(draw, names):
    patterns = {draw(st.sampled_from(names)): draw(RANKS)} if draw(st.booleans()) else {}
    alpha = draw(st.integers(1, 64)) / 2
    return draw(
        st.sampled_from(
            [
                Lora(rank=2, alpha=alpha, rank_pattern=patterns, use_rslora=draw(st.booleans())),
                Lora(rank=1, alpha=alpha, alpha_pattern=dict.fromkeys(patterns, 3.0), use_dora=True),
                Hira(rank=2),  # whose pattern of ranks is written as zeros
                Loha(rank=2, alpha=alpha, rank_pattern=patterns),
                Ia3(feedforward_modules=names[:1]),
            ]
        )
    )


def drawn(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), tree)


@given(bases(), st.integers(0, 99), st.data())
def test_an_adapter_that_is_saved_is_the_one_that_is_loaded(base, seed, data):
    params, sites = base
    method = data.draw(methods([path.rpartition("/")[2] for path in sites]))
    frozen, adapters = init_adapters(params, method, sites, rng=jax.random.key(0))
    adapters = drawn(adapters, seed)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(directory, adapters, method, base=BASE, frozen=frozen)
        again, loaded, loaded_method = load_adapter(directory, params)
        files = {path.name for path in Path(directory).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert type(loaded_method) is type(method)
    # A file may say the same in other words: a pattern that gives what every layer has is left out.
    assert [loaded_method.at(path) for path in sites] == [method.at(path) for path in sites]
    chex.assert_trees_all_equal(loaded, adapters)
    chex.assert_trees_all_equal(again, frozen)


@given(bases(), st.floats(0, 0.9), st.integers(0, 99), st.booleans())
def test_what_is_pruned_is_saved_as_zeros_and_a_rank_without_entries_not_at_all(base, sparsity, seed, packed):
    params, sites = base
    method = Lora(rank=2, alpha=4.0)
    _, adapters = init_adapters(params, method, sites, rng=jax.random.key(0))
    adapters = drawn(adapters, seed)
    masks = prune(adapters["sites"], sparsity)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(directory, adapters, method, base=BASE, masks=masks, packed=packed)
        _, loaded, loaded_method = load_adapter(directory, params)
    smaller, left = method.without_pruned(apply_masks(adapters["sites"], masks), masks)
    chex.assert_trees_all_equal(loaded["sites"], left)
    assert [loaded_method.at(path) for path in sites] == [smaller.at(path) for path in sites]
    for path, mask in masks.items():
        if (np.asarray(mask["a"]).any(0) & np.asarray(mask["b"]).any(1)).all():
            chex.assert_trees_all_equal(loaded["sites"][path], apply_masks(adapters["sites"], masks)[path])


@given(bases(), st.data())
def test_leaves_that_train_whole_come_back_in_their_own_layout(base, data):
    """Kernels are `[in, out]` here and `[out, in]` in the file."""
    params, sites = base
    paths = sorted(leaf_paths(params))
    whole = data.draw(st.lists(st.sampled_from(paths), min_size=1, unique=True))
    free = {path: site for path, site in sites.items() if not any(leaf.startswith(f"{path}/") for leaf in whole)}
    method = Lora(rank=1, alpha=2.0) if free else None
    frozen, adapters = init_adapters(params, method, free, rng=jax.random.key(0), fully_trained=whole)
    adapters = drawn(adapters, 3)
    with tempfile.TemporaryDirectory() as directory:
        save_adapter(directory, adapters, method, base=BASE, frozen=frozen)
        _, loaded, _ = load_adapter(directory, params)
    assert {f"{layer}/{name}" for layer, leaves in loaded["modules"].items() for name in leaves} == set(whole)
    chex.assert_trees_all_equal(loaded, adapters)
