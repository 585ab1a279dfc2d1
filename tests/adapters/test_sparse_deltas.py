"""SHiRA, Super-Tuning and S²FT: which entries train, what a step of them keeps, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpeft.adapters import FrozenLayer, S2ft, Shira, Site, SuperTuning
from jaxpeft.adapters.build import init_adapters
from jaxpeft.adapters.shira import sparse_product, with_entries
from jaxpeft.adapters.sparse_indices import check_indices, choose_indices, places, redraw
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.merging import dropped_updates, merge
from jaxpeft.trees import CONSTANTS, beside_model, constants_of, count, without_shared

RNG = jax.random.key(0)
SITE = Site("layer", 3, 4)
# The entry [i, o] has the flat index 3·o + i. Sizes are 1 to 12 but for the equal ones at [0, 1] and [2, 3].
KERNEL = jnp.array([[1.0, -7.0, 3.0, 4.0], [5.0, 6.0, -2.0, 8.0], [-9.0, 10.0, 11.0, 7.0]])


def chosen(choice, number, **options):
    return choose_indices(choice, number, SITE, rng=RNG, kernel=lambda: KERNEL, **options).tolist()


def test_the_largest_and_the_smallest_weights_by_hand():
    assert chosen("magnitude", 3) == [2, 5, 8]  # 9, 10, 11
    assert chosen("smallest", 3) == [0, 6, 7]  # 1, 3, 2
    assert chosen("magnitude", 5) == [2, 3, 5, 8, 10]  # of the two sevens the one with the lower index, 3


def test_the_largest_gradients():
    assert chosen("gradient", 2, gradient=-KERNEL.at[0, 0].set(-50)) == [0, 8]


def test_random_entries_are_different_and_depend_on_the_key():
    found = chosen("random", 12)
    assert found == list(range(12))
    site = Site("layer", 40, 50)
    draws = [choose_indices("random", 300, site, rng=jax.random.key(i), kernel=lambda: KERNEL) for i in range(2)]
    for draw in draws:
        assert draw.dtype == jnp.int32
        assert len(set(draw.tolist())) == 300
        assert 0 <= int(draw.min()) <= int(draw.max()) < 2000
    assert (draws[0] != draws[1]).any()


def test_blocks_are_whole_and_the_last_is_cut():
    """Squares of 2 × 2, and smaller ones at the edge: rows {0, 1}, {2}; columns {0, 1}, {2, 3}. The largest mean is row 2's."""
    assert chosen("block", 4, block_size=2) == [2, 5, 8, 11]  # 9² + 10² over 2, then 11² + 7² over 2
    assert chosen("block", 5, block_size=2) == [0, 2, 5, 8, 11]  # the next square begins with its first entry


def test_places_are_those_of_torch_s_layout():
    rows, columns = places(jnp.arange(12), 3)
    np.testing.assert_array_equal(KERNEL[rows, columns], KERNEL.T.reshape(-1))


def test_an_unknown_choice_and_missing_gradients_are_refused():
    with pytest.raises(InputError, match="mask_type is 'mine'; it must be one of random, magnitude"):
        chosen("mine", 2)
    with pytest.raises(InputError, match="mask_type 'gradient' needs the gradient of layer layer"):
        chosen("gradient", 2)
    with pytest.raises(InputError, match=r"has shape \[4, 3\]; its kernel is \[3, 4\]"):
        chosen("gradient", 2, gradient=KERNEL.T)


def test_indices_of_a_file_are_checked():
    check_indices(jnp.array([0, 11, 5]), 12, "it")
    with pytest.raises(InputError, match="it has the index 12, outside 0 to 11"):
        check_indices(jnp.array([0, 12]), 12, "it")
    with pytest.raises(InputError, match="it has the index 5 more than once"):
        check_indices(jnp.array([5, 3, 5]), 12, "it")


def test_redrawing_by_hand():
    """Two of four are given up: the zero at the higher index, and the 1. The best free entries take their slots."""
    indices, values = jnp.array([7, 2, 9, 4]), jnp.array([0.0, -3.0, 1.0, 0.0])
    scores = jnp.zeros(12).at[jnp.array([2, 5, 9, 0])].set(jnp.array([9.0, 8.0, 7.0, 6.0]))
    new, kept_values, kept = redraw(indices, values, scores, 2)
    assert kept.tolist() == [False, True, True, False]  # both zeros, as |0| < |1|
    assert new.tolist() == [5, 2, 9, 0]  # 2 and 9 are in use: 5 and 0 are left
    assert kept_values.tolist() == [0, -3, 1, 0]
    new, _, kept = redraw(indices, values, scores, 1)
    assert kept.tolist() == [False, True, True, True]  # of the equal ones that with the higher index
    chex.assert_trees_all_equal(redraw(indices, values, scores, 0)[:2], (indices, values))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 6))
def test_redrawing_keeps_the_largest_and_names_no_entry_twice(seed, number):
    rng = np.random.default_rng(seed)
    indices = rng.permutation(20)[:6].astype(np.int32)
    values = rng.integers(-2, 3, 6).astype(np.float32)
    scores = rng.integers(0, 4, 20).astype(np.float32)
    new, after, kept = map(np.asarray, REDRAW(indices, values, scores, number))
    assert len(set(new.tolist())) == 6
    assert kept.sum() == 6 - number
    np.testing.assert_array_equal(new[kept], indices[kept])
    np.testing.assert_array_equal(after, np.where(kept, values, 0))
    if 0 < number < 6:
        assert np.abs(values[~kept]).max() <= np.abs(values[kept]).min()
        unused = np.setdiff1d(np.arange(20), new)
        assert scores[new[~kept]].min() >= scores[unused].max()


REDRAW = jax.jit(redraw)


def test_a_layer_gives_up_a_share_of_its_values_and_nothing_of_its_lora():
    method = SuperTuning(sparsity=0.5, rank=1)
    params = {"v": jnp.array([0.1, -3.0, 0.2, 5.0, 4.0, 6.0]), "a": jnp.ones((3, 1)), "b": jnp.ones((1, 4))}
    constants = {"indices": jnp.array([8, 5, 2, 4, 1, 3])}
    scores = jnp.zeros((3, 4)).at[2, 3].set(9.0).at[0, 3].set(8.0).at[1, 1].set(7.0)  # 11, 9, and 4, which is in use
    after, drawn, fresh = method.redraw(params, constants, scores, 0.45)  # of six entries 2.7, so two
    assert drawn["indices"].tolist() == [11, 5, 9, 4, 1, 3]
    assert after["v"].tolist() == [0, -3, 0, 5, 4, 6]
    assert fresh["v"].tolist() == [True, False, True, False, False, False]
    assert not fresh["a"].any()
    assert not fresh["b"].any()
    assert (after["a"], after["b"]) == (params["a"], params["b"])


def test_indices_in_the_masks_take_the_place_of_the_first_ones():
    toy, method = tiny.Toy(), Shira(rank=1)
    frozen, adapters = tiny.adapted(toy, method)
    up = (constants_of(frozen)["up"]["indices"] + 7) % (16 * 24)
    masks = {"up": {"indices": up}}  # "down" keeps its own
    moved = {**frozen, CONSTANTS: {**frozen[CONSTANTS], "up": {"indices": up}}}
    merged = merge(frozen, adapters, method, masks=masks)
    chex.assert_trees_all_equal(merged, merge(moved, adapters, method))
    assert (merged["up"]["kernel"] != merge(frozen, adapters, method)["up"]["kernel"]).any()
    ids = jnp.arange(6)[None]
    found = apply(toy.module, frozen, adapters, method, masks=masks, input_ids=ids).logits
    np.testing.assert_array_equal(found, apply(toy.module, moved, adapters, method, input_ids=ids).logits)
    with pytest.raises(InputError, match="shira cannot be pruned"):
        merge(frozen, adapters, method, masks={"up": {"v": jnp.ones(40, bool), "indices": up}})


def test_what_a_merge_that_keeps_the_zeros_costs_at_the_indices_in_force():
    toy, method = tiny.Toy(), Shira(rank=1)
    toy.params["up"]["kernel"] = toy.params["up"]["kernel"].at[:, 0].set(0)
    frozen, adapters = tiny.adapted(toy, method, target_modules=["up"])
    masks = {"up": {"indices": jnp.arange(40, dtype=jnp.int32)}}  # 16 of them are at the zeros, in column 0
    cost = dropped_updates(frozen, adapters, method, masks=masks)["up"]
    v = np.asarray(adapters["sites"]["up"]["v"])
    assert cost.dropped == pytest.approx(np.linalg.norm(v[:16]) / np.linalg.norm(v), rel=1e-6)
    own = constants_of(frozen)["up"]["indices"]
    assert dropped_updates(frozen, adapters, method)["up"].dropped == pytest.approx(
        np.linalg.norm(v[np.asarray(own) < 16]) / np.linalg.norm(v), rel=1e-6
    )


def test_the_product_and_its_gradients_are_the_dense_ones():
    x, dy = jnp.asarray(tiny.normal(0, 2, 5, 3)), jnp.asarray(tiny.normal(1, 2, 5, 4))
    values, (rows, columns) = jnp.array([0.5, -2.0]), places(jnp.array([4, 9]), 3)

    def plain(x, kernel, values):
        return ((x @ with_entries(kernel, values, rows, columns)) * dy).sum()

    def own(x, kernel, values):
        return (sparse_product(x, kernel, values, rows, columns) * dy).sum()

    grads = [jax.grad(f, argnums=(0, 1, 2))(x, KERNEL, values) for f in (own, plain)]
    chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-5)


def test_what_a_method_keeps_for_the_backward_pass():
    """SHiRA: no second kernel. S²FT: of the inputs only the chosen ones."""
    site = Site("layer", 64, 48)
    kernel, x = jnp.ones((64, 48)), jnp.ones((10, 64))
    layer = FrozenLayer(lambda x: x @ kernel, kernel.astype, None, jnp.float32)
    for method, size in ((Shira(rank=1), 112), (S2ft(channels=3), 3 * 48)):
        params = method.init(RNG, site, lambda: kernel) | method.init_constants(RNG, site, lambda: kernel)
        (trained,) = (name for name in params if name not in method.constants)

        def forward(value, method=method, params=params, trained=trained):
            return method.forward(x, {**params, trained: value}, layer, None)

        assert params[trained].size == size
        kept = jax.tree.leaves(jax.vjp(forward, params[trained])[1])
        own = [leaf for leaf in kept if leaf.size >= x.size and leaf is not kernel]
        assert [leaf.shape for leaf in own if leaf.shape == kernel.shape and not (leaf == kernel).all()] == []
        if isinstance(method, S2ft):
            assert (10, 64) not in [leaf.shape for leaf in kept]
            assert (10, 3) in [leaf.shape for leaf in kept]


def test_small_values_are_not_rounded_away_in_bf16():
    """W₀ = 1 and x = (1, −1): the base gives 0, and a value of 2⁻¹⁰ gives 2⁻¹⁰, though 1 + 2⁻¹⁰ is 1 in bf16."""
    kernel, x = jnp.ones((2, 1), jnp.bfloat16), jnp.array([[1.0, -1.0]], jnp.bfloat16)
    layer = FrozenLayer(lambda x: x @ kernel, kernel.astype, None, jnp.bfloat16)
    small = jnp.array([2.0**-10])
    for method, params in (
        (Shira(rank=1), {"v": small, "indices": jnp.array([0])}),
        (S2ft(channels=1), {"delta": small[None], "rows": jnp.array([0])}),
    ):
        out = method.forward(x, params, layer, None)
        assert out.dtype == jnp.bfloat16
        assert float(out[0, 0]) == 2.0**-10


def test_dropout_falls_on_the_lora_of_supra_alone():
    method = SuperTuning(sparsity=0.5, rank=2, dropout=0.5)
    assert method.uses_rng
    assert not SuperTuning(dropout=0.5).uses_rng  # as in PEFT, ignored without a LoRA
    params = method.init(RNG, SITE, lambda: KERNEL) | method.init_constants(RNG, SITE, lambda: KERNEL)
    params["v"] = params["v"] + 1
    layer = FrozenLayer(lambda x: x @ KERNEL, KERNEL.astype, None, jnp.float32)
    x = jnp.asarray(tiny.normal(0, 5, 3))
    plain = method.forward(x, params, layer, None)
    np.testing.assert_array_equal(method.forward(x, params, layer, RNG), plain)  # B = 0 silences the LoRA
    params["b"] = params["b"] + 1
    assert (method.forward(x, params, layer, RNG) != method.forward(x, params, layer, None)).any()


def test_numbers_of_entries_are_peft_s():
    assert Shira(rank=2).num_entries(Site("layer", 16, 24)) == 80
    assert SuperTuning(sparsity=0.9).num_entries(Site("layer", 16, 24)) == 38  # 38.4 rounded down
    assert SuperTuning(rank=3).scaling == 2
    assert SuperTuning(rank=3, alpha=6).scaling == 2
    assert SuperTuning().scaling == 0
    assert SuperTuning(sparsity=0.5, select_top=False).init_constants(RNG, SITE, lambda: KERNEL)[
        "indices"
    ].tolist() == [
        *(0, 7, 6, 9, 1),
        4,
    ]


def test_values_that_are_not_zero_are_for_tests():
    for method in (Shira(rank=1, init_weights=False), SuperTuning(sparsity=0.2, rank=1, init_weights=False)):
        params = method.init(RNG, SITE, lambda: KERNEL)
        assert all((leaf != 0).any() for leaf in params.values())


def test_a_seed_of_their_own_makes_random_entries_the_same_in_every_run():
    site = Site("layer", 20, 30)
    for kind, name in ((Shira, "indices"), (S2ft, "rows")):
        options = {"rank": 2} if kind is Shira else {"channels": 5}
        own, again = (
            kind(**options, random_seed=3).init_constants(jax.random.key(i), site, lambda: KERNEL)[name] for i in (0, 1)
        )
        np.testing.assert_array_equal(own, again)
        other = kind(**options).init_constants(RNG, site, lambda: KERNEL)[name]
        assert (own != other).any()
        assert kind.depends_on_seed({})
        assert not kind.depends_on_seed({"random_seed": 3})
    assert Shira.depends_on_seed({"mask_type": "gradient"})
    assert not Shira.depends_on_seed({"mask_type": "block"})
    assert S2ft.depends_on_seed({"selection": "activation"})
    assert not S2ft.depends_on_seed({"selection": "weight"})
    assert not SuperTuning.depends_on_seed({})


HEADS = {"attention_modules": ["out"], "head_dim": 2}


def rows(method, site, statistics=None):
    kernel = jnp.arange(1.0, 1 + site.d_in)[:, None] * jnp.ones((1, site.d_out))
    return method.at(site.path).init_constants(RNG, site, lambda: kernel, statistics)["rows"].tolist()


def test_heads_and_channels_are_whole():
    heads, channels = Site("a/out", 8, 3), Site("a/in", 8, 3)
    method = S2ft(channels=3, heads=2, selection="weight", **HEADS)
    assert rows(method, heads) == [4, 5, 6, 7]
    assert rows(method, channels) == [5, 6, 7]
    assert rows(S2ft(channels=3, selection="weight", select_top=False), channels) == [0, 1, 2]
    drawn = rows(S2ft(heads=2, **HEADS), heads)
    assert drawn == sorted(drawn)
    assert [row // 2 for row in drawn[::2]] == [row // 2 for row in drawn[1::2]]
    sizes = jnp.array([5.0, 5, 0, 1, 9, 0, 0, 0])
    assert rows(S2ft(heads=1, selection="activation", **HEADS), heads, sizes) == [0, 1]
    assert rows(S2ft(channels=1, selection="activation", **HEADS), channels, sizes) == [4]
    assert rows(S2ft(channels=1, selection="gradient"), channels, jnp.zeros((8, 3)).at[6, 1].set(-1)) == [6]
    assert method.at("a/out").shapes(heads) == {"delta": (4, 3)}
    assert method.at("a/in").constant_shapes(channels) == {"rows": (3,)}


def test_what_the_choice_must_measure():
    assert S2ft().statistics is None
    assert S2ft(selection="activation").statistics == "magnitudes"
    assert S2ft(selection="gradient").statistics == Shira(mask_type="gradient").statistics == "gradients"
    assert Shira().statistics is None
    assert SuperTuning().statistics is None
    with pytest.raises(InputError, match=r"selection 'activation' needs statistics of shape \[8\].*there are none"):
        rows(S2ft(channels=1, selection="activation"), Site("a/in", 8, 3))
    with pytest.raises(InputError, match=r"of shape \[8, 3\].*there are some of shape \[8\]"):
        rows(S2ft(channels=1, selection="gradient"), Site("a/in", 8, 3), jnp.ones(8))


REFUSED = {
    "rank": (lambda: Shira(rank=0), "adapter.rank 0 must be at least 1"),
    "start": (lambda: Shira(init_weights="gaussian"), "init_weights of a sparse update must be true or false"),
    "block": (lambda: Shira(block_size=0), "block_size 0 must be at least 1"),
    "small": (lambda: Shira(rank=2).num_entries(SITE), "asks for 14 entries, and layer layer has 12 .* at most 1"),
    "sparsity": (lambda: SuperTuning(sparsity=1.0), "adapter.sparsity is 1.0; it must be at least 0 and below 1"),
    "nothing": (lambda: SuperTuning(sparsity=0.99).num_entries(SITE), "leaves no entry of layer layer"),
    "supra-rank": (lambda: SuperTuning(rank=0), "adapter.rank 0 must be at least 1"),
    "alpha": (lambda: SuperTuning(alpha=4), "adapter.alpha 4 scales the LoRA beside .* set adapter.rank too"),
    "selection": (lambda: S2ft(selection="best"), "selection is 'best'; it must be one of random, weight"),
    "bottom": (lambda: S2ft(select_top=False), "select_top false has no meaning for selection 'random'"),
    "channels": (lambda: S2ft(channels=0), "adapter.channels is 0; it must be at least 1"),
    "wide": (lambda: S2ft(channels=9).num_rows(Site("a", 8, 3)), "channels 9 is more than the 8 inputs of layer a"),
    "heads": (lambda: rows(S2ft(heads=5, **HEADS), Site("out", 8, 3)), "heads 5 is more than the 4 heads of layer out"),
    "head-dim": (lambda: rows(S2ft(attention_modules=["out"]), Site("out", 8, 3)), "head_dim None: the 8 inputs"),
    "odd": (lambda: rows(S2ft(**HEADS), Site("out", 7, 3)), "head_dim 2: the 7 inputs of layer out are no whole heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        make()


def test_indices_that_the_weights_do_not_determine():
    method = SuperTuning(sparsity=0.7, save_precomputed_indices=False)  # three entries
    assert not method.saves_constants
    constants = method.init_constants(RNG, SITE, lambda: KERNEL)
    assert constants["indices"].tolist() == [8, 5, 2]
    method.check_remade(SITE, KERNEL, constants)
    for sparsity in (0.5, 0.58):  # the two sevens are both among the largest, or one is the last of them
        method = SuperTuning(sparsity=sparsity, save_precomputed_indices=False)
        with pytest.raises(InputError, match="chosen entries of equal"):
            method.check_remade(SITE, KERNEL, method.init_constants(RNG, SITE, lambda: KERNEL))


def test_constants_are_kept_with_the_frozen_parameters_and_are_no_parameters():
    toy = tiny.Toy()
    method = Shira(rank=1)
    frozen, adapters = init_adapters(toy.params, method, toy.sites(), rng=RNG)
    assert frozen[CONSTANTS].keys() == adapters["sites"].keys() == {"up", "down"}
    assert constants_of(frozen)["up"]["indices"].shape == adapters["sites"]["up"]["v"].shape == (40,)
    assert without_shared(frozen)[0].keys() == toy.params.keys()
    assert beside_model(frozen) == {CONSTANTS: frozen[CONSTANTS]}
    assert count(frozen) == count(toy.params)
    merged = merge(frozen, adapters, method)
    assert merged.keys() == toy.params.keys()
    ids = jnp.zeros((1, 3), jnp.int32)
    base = toy.module.apply({"params": merged}, ids).logits
    np.testing.assert_array_equal(apply(toy.module, frozen, adapters, method, input_ids=ids).logits, base)


def test_pruned_rows_of_s2ft_are_the_base_s():
    toy, method = tiny.Toy(), S2ft(channels=4)
    frozen, adapters = init_adapters(toy.params, method, toy.sites(), rng=RNG)
    adapters["sites"] = jax.tree.map(lambda leaf: leaf + 1, adapters["sites"])
    masks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), adapters["sites"])
    chex.assert_trees_all_equal(merge(frozen, adapters, method, masks=masks), toy.params)
