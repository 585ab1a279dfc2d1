"""The ladder that every method climbs, on a small network: (method) × (how the base is stored) × (dense, masked).

test_ladder_models.py repeats the rungs that depend on the model on BERT, DistilBERT and RoBERTa.
"""

import functools
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from tiers import slow, slow_but

from jaxpeft.adapters import AdaLora, Hira, Ia3, Loha, Lokr, Lora, S2ft, Shira, Sora, SuperTuning, Vera
from jaxpeft.adapters.build import init_adapters
from jaxpeft.inject import apply, discover_sites
from jaxpeft.merging import merge
from jaxpeft.pruning import apply_masks
from jaxpeft.quantization import quantize

METHODS = {
    "lora": Lora(rank=4, alpha=6.0),
    "rslora": Lora(rank=4, alpha=3.0, use_rslora=True, rank_pattern={"up": 2}, alpha_pattern={"down": 4.0}),
    "lora-bias": Lora(rank=4, alpha=6.0, lora_bias=True),
    "dora": Lora(rank=4, alpha=6.0, use_dora=True),
    "base-zeros": Lora(rank=4, alpha=6.0, keep_base_zeros=True),  # NF4 rounds some weights to zero
    "hira": Hira(rank=4, rank_pattern={"down": 3}),
    "ia3": Ia3(feedforward_modules=["down"]),
    "ia3-up": Ia3(feedforward_modules="up"),
    "vera": Vera(rank=40),  # wider than the layers
    "loha": Loha(rank=4, alpha=6.0, rank_pattern={"down": 6}),  # by thin factors, and by the full update
    "lokr": Lokr(rank=2, alpha=3.0, decompose_both=True),
    "lokr-full": Lokr(rank=8, decompose_factor=4),
    "adalora": AdaLora(init_r=4, target_r=2, alpha=6.0),
    "shira": Shira(rank=4),
    "supertuning": SuperTuning(sparsity=0.8, select_top=False),
    "supra": SuperTuning(sparsity=0.9, rank=4, alpha=6.0),
    "s2ft": S2ft(channels=6, heads=2, head_dim=8, attention_modules=["down"]),
    "sora": Sora(rank=4, alpha=6.0),
}
DROPPING = {
    "lora": Lora(rank=4, dropout=0.5),
    "base-zeros": Lora(rank=4, dropout=0.5, keep_base_zeros=True),
    "hira": Hira(rank=4, dropout=0.5),
    "vera": Vera(rank=4, dropout=0.5),
    "loha": Loha(rank=4, rank_dropout=0.5, module_dropout=0.5, rank_pattern={"down": 6}),
    "lokr": Lokr(rank=2, rank_dropout=0.5, rank_dropout_scale=True),
    "adalora": AdaLora(init_r=4, target_r=2, dropout=0.5),
    "supra": SuperTuning(rank=4, dropout=0.5),
    "sora": Sora(rank=4, dropout=0.5),
}
BASES = ("fp32", "bf16", "nf4", "nf4-bf16")
X = jnp.asarray(tiny.normal(0, 8, 32))
Y = jnp.asarray(tiny.normal(1, 8, 32))
NO_ADAPTERS: dict = {"sites": {}, "modules": {}}
TOLERANCE = 1e-5
# Relative to the largest value. A bf16 result is rounded by up to u = 2⁻⁸; a path forward and back through both layers has
# about twenty roundings, whose random sum is √20·u = 4.5 u.
BF16_TOLERANCE = 8 * 2**-8

pytestmark = pytest.mark.xdist_group("ladder")


class Network(nn.Module):
    """Two linear layers, one without bias, around dropout."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.gelu(nn.Dense(48, dtype=self.dtype, name="up")(x))
        x = nn.Dropout(0.3)(x, deterministic=deterministic)
        return nn.Dense(32, dtype=self.dtype, use_bias=False, name="down")(x)


def base_of(storage):
    """`(module, params)`; matrices are stored in 4 bits, in bf16 or in fp32."""
    dtype = jnp.bfloat16 if "bf16" in storage else jnp.float32
    params = {
        "up": {"kernel": tiny.normal(2, 32, 48, scale=0.2), "bias": tiny.normal(3, 48)},
        "down": {"kernel": tiny.normal(4, 48, 32, scale=0.2)},
    }
    for layer in params.values():
        kernel = layer["kernel"]
        layer["kernel"] = quantize(kernel) if "nf4" in storage else jnp.asarray(kernel, dtype)
    return Network(dtype), jax.tree.map(jnp.asarray, params)


def adapt(method, module, params, *, nonzero):
    sites = discover_sites(module, params, x=X)
    if getattr(method, "lora_bias", False):  # a bias has nowhere to go in the layer without one
        del sites["down"]
    frozen, adapters = init_adapters(params, method, sites, rng=jax.random.key(0))
    if nonzero:
        for i, site in enumerate(adapters["sites"].values()):
            for j, (name, value) in enumerate(sorted(site.items())):
                site[name] = value + jnp.asarray(tiny.normal(10 * (i + 1) + j, *value.shape))
    return frozen, adapters


def assert_close(actual, expected, storage):
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    if "bf16" in storage:
        chex.assert_trees_all_close(actual, expected, rtol=0, atol=BF16_TOLERANCE * scale)
    else:
        chex.assert_trees_all_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * max(scale, 1))


MASKED = {name for name, method in METHODS.items() if method.prunable or method.allocated}
KINDS = {name: ("dense", "masked") if name in MASKED else ("dense",) for name in METHODS}


def tier(name, storage, kind):
    """The fast tier has every method on fp32, dense and masked; and those on NF4 that read the base in a way of their own."""
    return () if storage == "fp32" or (kind == "dense" and storage == "nf4" and name in ON_NF4) else slow


ON_NF4 = ("lora", "base-zeros", "dora", "hira", "ia3", "shira", "s2ft")
RUNGS = [
    pytest.param(m, s, k, marks=tier(m, s, k), id=f"{m}-{s}-{k}") for m in METHODS for s in BASES[:3] for k in KINDS[m]
]


@dataclass(frozen=True)
class Rung:
    """A method on a stored base, and what one compiled program computes of it.

    `base` and `side`: the network's output without and with the adapter; `gradients` of a loss of the latter, and
    `oracle`, those of the same loss of the merged network.
    """

    module: Any
    frozen: dict
    adapters: dict
    masks: dict | None
    base: Any
    side: Any
    gradients: Any
    oracle: Any


@functools.cache
def rung(name, storage, kind):
    method = METHODS[name]
    module, params = base_of(storage)
    frozen, adapters = adapt(method, module, params, nonzero=True)
    masks = tiny.half_masks(adapters) if kind == "masked" else None

    @jax.jit
    def compute(frozen, adapters, masks):
        def loss(out):
            return jnp.square(out.astype(jnp.float32) - Y).mean()

        def side(a):
            out = apply(module, frozen, a, method, masks=masks, x=X)
            return loss(out), out

        def merged(a):
            return loss(module.apply({"params": tiny.merge_pure(frozen, a, method, masks)}, X))

        gradients, out = jax.grad(side, has_aux=True)(adapters)
        return apply(module, frozen, NO_ADAPTERS, x=X), out, gradients, jax.grad(merged)(adapters)

    return Rung(module, frozen, adapters, masks, *compute(frozen, adapters, masks))


@functools.cache
def plain(module):
    """The network by itself, compiled."""
    return jax.jit(lambda params: module.apply({"params": params}, X))


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        pytest.param(m, s, marks=() if s == "fp32" or (m, s) in {("lora", "nf4"), ("hira", "nf4")} else slow)
        for m in METHODS
        for s in BASES
    ],
)
def test_the_start_is_the_base_bit_for_bit(name, storage):
    """HiRA too: without dropout it computes x·(W₀ ⊙ (1 + 0)), and W₀·1 is W₀.

    Operation by operation. Compiled into one program the two differ by 7e-7: XLA fuses an addition into the product
    before it, and sums in another order.
    """
    method = METHODS[name]
    module, params = base_of(storage)
    frozen, adapters = adapt(method, module, params, nonzero=False)
    base = module.apply({"params": tiny.merge_pure(params, NO_ADAPTERS, None)}, X)
    can_be_masked = method.prunable or method.allocated
    for masks in ({}, *([tiny.half_masks(adapters)] if can_be_masked else [])):
        adapted = apply(module, frozen, adapters, method, masks=masks, x=X)
        assert adapted.dtype == base.dtype == module.dtype
        np.testing.assert_array_equal(adapted, base)
    compiled = jax.jit(lambda a: apply(module, frozen, a, method, x=X))(adapters)
    assert_close(compiled.astype(jnp.float32), base.astype(jnp.float32), storage)


def test_a_4_bit_layer_is_the_layer_of_its_dequantised_kernel():
    module, params = base_of("nf4")
    expected = module.apply({"params": merge(params, NO_ADAPTERS)}, X)
    np.testing.assert_array_equal(apply(module, params, NO_ADAPTERS, x=X), expected)


@pytest.mark.parametrize(("method", "storage", "kind"), RUNGS)
def test_the_side_path_is_the_merged_model(method, storage, kind):
    case = rung(method, storage, kind)
    merged = plain(case.module)(merge(case.frozen, case.adapters, METHODS[method], masks=case.masks))
    side, base = case.side, case.base
    assert side.dtype == merged.dtype == case.module.dtype
    assert jnp.abs(side - base).max() > 0.1 * jnp.abs(base).max()  # the adapters say something
    assert_close(side.astype(jnp.float32), merged.astype(jnp.float32), storage)


@pytest.mark.parametrize(("method", "storage", "kind"), RUNGS)
def test_gradients_are_those_of_the_merged_model(method, storage, kind):
    case = rung(method, storage, kind)
    side = case.gradients
    chex.assert_trees_all_equal_shapes_and_dtypes(side, case.adapters)
    chex.assert_tree_all_finite(side)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(side))
    assert_close(side, case.oracle, storage)
    chex.assert_trees_all_equal(apply_masks(side["sites"], case.masks or {}), side["sites"])


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_merging_in_fp32_joins_everything_once(method, storage):
    module, params = base_of(storage)
    frozen, adapters = adapt(method, module, params, nonzero=True)
    merged = merge(frozen, adapters, method)
    expected = tiny.merge_pure(frozen, adapters, method)
    chex.assert_trees_all_equal(merged, expected)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(merged))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("method", DROPPING.values(), ids=DROPPING)
def test_dropout_of_the_adapter_leaves_the_base_s_dropout_as_it_is(method, storage):
    """B = 0 makes the adapter silent; what is left of the noise is the base's, and must be what it was without adapters."""
    module, params = base_of(storage)
    frozen, adapters = adapt(method, module, params, nonzero=False)
    rngs = {"dropout": jax.random.key(5)}
    base = module.apply({"params": merge(params, NO_ADAPTERS)}, X, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(apply(module, frozen, adapters, method, dropout_rng=rngs["dropout"], x=X), base)


@pytest.mark.parametrize("method", [Lora(rank=4, dropout=0.25), Hira(rank=4, dropout=0.25)], ids=["lora", "hira"])
def test_dropout_falls_on_the_adapter_s_input_alone(method):
    """One layer, all inputs 1: what the adapter adds is a sum over the kept inputs, each 1/0.75."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic=True):
            return nn.Dense(32, name="query")(x), nn.Dense(32, name="value")(x)

    module, x = Two(), jnp.ones((64, 32))
    kernel = jnp.eye(32)  # what reaches output j is then what the adapter makes of input j
    params = {name: {"kernel": kernel, "bias": jnp.full(32, 0.5)} for name in ("query", "value")}
    frozen, adapters = init_adapters(params, method, discover_sites(module, params, x=x), rng=jax.random.key(0))
    for site in adapters["sites"].values():
        site.update(a=jnp.ones((32, 4)), b=jnp.ones((4, 32)))

    def run(key):
        return apply(module, frozen, adapters, method, dropout_rng=key, x=x)

    query, value = run(jax.random.key(1))
    again, other = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(query, again[0])
    assert (query != value).any()  # each site draws its own mask
    assert (query != other[0]).any()
    if isinstance(method, Hira):  # the delta at (i, j) is x_j · 4 where x_j is kept, 0 where it is not
        kept = np.asarray(query) > 2
        np.testing.assert_allclose(query, np.where(kept, 1.5 + 4 / 0.75, 1.5), rtol=1e-6)
        share = kept.mean()
    else:  # every output of a row sums all kept inputs, times scaling 2 · 4 columns
        share = float((np.asarray(query)[:, 0] - 1.5).mean()) / (4 * method.scaling * 32) * 0.75
    assert abs(share - 0.75) < 5 * np.sqrt(0.75 * 0.25 / (64 * 32))


@pytest.mark.parametrize("name", slow_but(DROPPING, "lora", "hira"))
def test_the_rematerialised_4_bit_layer_drops_the_same_inputs_in_the_backward_pass(name):
    method = DROPPING[name]
    module, params = base_of("nf4")
    frozen, adapters = adapt(method, module, params, nonzero=True)
    plain = {**frozen, **merge(frozen, NO_ADAPTERS)}

    def gradients(base):
        def loss(a):
            return jnp.square(apply(module, base, a, method, dropout_rng=jax.random.key(3), x=X) - Y).mean()

        return jax.value_and_grad(loss)(adapters)

    assert_close(gradients(frozen), gradients(plain), "nf4")


def test_fp32_adapters_do_not_promote_a_bf16_model():
    for method in METHODS.values():
        module, params = base_of("bf16")
        frozen, adapters = adapt(method, module, params, nonzero=True)
        out, seen = jax.eval_shape(
            lambda a: (apply(module, frozen, a, method, x=X), jax.tree.map(lambda leaf: leaf, a)),  # noqa: B023
            adapters,
        )
        assert out.dtype == jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype("float32")}
