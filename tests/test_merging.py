import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Hira, Lora
from jaxpeft.merging import merge
from jaxpeft.models.build import Quantization
from jaxpeft.paths import leaf_paths
from jaxpeft.quant.nf4 import Nf4Tensor, dequantize

METHOD = Lora(rank=4, alpha=8.0)


def test_only_adapted_kernels_and_whole_leaves_change(bert):
    frozen, adapters = tiny.adapted(bert, METHOD, whole_leaves=["cls/predictions/bias"])
    adapters["modules"]["cls/predictions"]["bias"] += 1
    merged, before = leaf_paths(merge(frozen, adapters, METHOD)), leaf_paths(bert.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(merged, before)
    changed = {path for path in before if (merged[path] != before[path]).any()}
    assert changed == {f"{path}/kernel" for path in adapters["sites"]} | {"cls/predictions/bias"}


def test_the_numbers_by_hand():
    frozen = {"layer": {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([7.0, 8.0])}}
    sites = {"layer": {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[10.0, 20.0]])}}
    adapters = {"sites": sites, "modules": {}}
    masks = {"layer": {"a": jnp.array([[True], [False]]), "b": jnp.array([[True, True]])}}
    lora, hira = Lora(rank=1, alpha=0.5), Hira(rank=1)
    np.testing.assert_array_equal(merge(frozen, adapters, lora)["layer"]["kernel"], [[6, 12], [13, 24]])
    np.testing.assert_array_equal(merge(frozen, adapters, lora, masks=masks)["layer"]["kernel"], [[6, 12], [3, 4]])
    np.testing.assert_array_equal(merge(frozen, adapters, hira)["layer"]["kernel"], [[11, 42], [63, 164]])
    np.testing.assert_array_equal(merge(frozen, adapters, lora)["layer"]["bias"], [7, 8])
    assert merge(frozen, {"sites": {}, "modules": {}}) == frozen


def test_a_4_bit_base_is_merged_in_fp32_and_every_kernel_dequantised(tiny_models):
    model = tiny_models("bert", quantization=Quantization())
    frozen, adapters = tiny.adapted(model, METHOD)
    merged = leaf_paths(merge(frozen, adapters, METHOD))
    for path, leaf in leaf_paths(frozen).items():
        if isinstance(leaf, Nf4Tensor):
            chex.assert_shape(merged[path], leaf.shape)
            chex.assert_type(merged[path], jnp.float32)
            site = adapters["sites"].get(path.removesuffix("/kernel"))
            delta = METHOD.scaling * site["a"] @ site["b"] if site else 0
            np.testing.assert_allclose(merged[path], dequantize(leaf) + delta, rtol=1e-6, atol=1e-6)


def test_a_bf16_kernel_is_merged_in_fp32_and_rounded_once():
    kernel = jnp.asarray(tiny.normal(0, 8, 8), jnp.bfloat16)
    site = {"a": jnp.asarray(tiny.normal(1, 8, 4)), "b": jnp.asarray(tiny.normal(2, 4, 8))}
    adapters = {"sites": {"layer": site}, "modules": {}}
    merged = merge({"layer": {"kernel": kernel}}, adapters, METHOD)["layer"]["kernel"]
    exact = kernel.astype(jnp.float32) + METHOD.scaling * site["a"] @ site["b"]
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_diverged_adapter_is_refused(bad):
    frozen = {"layer": {"kernel": jnp.ones((2, 2))}}
    adapters = {"sites": {"layer": {"a": jnp.full((2, 1), bad), "b": jnp.ones((1, 2))}}, "modules": {}}
    with pytest.raises(ValueError, match="the merged kernel of layer is not finite"):
        merge(frozen, adapters, Lora(rank=1))


def test_merging_takes_nothing_from_its_arguments(bert):
    frozen, adapters = tiny.adapted(bert, METHOD)
    before = tiny.snapshot((frozen, adapters))
    merged = merge(frozen, adapters, METHOD)
    merged["bert"].clear()
    chex.assert_trees_all_equal(tiny.snapshot((frozen, adapters)), before)
