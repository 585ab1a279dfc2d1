import chex
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import AdaLora, Hira, Ia3, Loha, Lokr, Lora, Shira, Vera
from jaxpeft.errors import InputError
from jaxpeft.merging import merge, unmerge
from jaxpeft.models.build import Quantization
from jaxpeft.quantization import dequantize, is_quantized, quantize_like
from jaxpeft.trees import leaf_paths, without_shared

METHOD = Lora(rank=4, alpha=8.0)


def test_only_adapted_kernels_and_whole_leaves_change(bert):
    frozen, adapters = tiny.adapted(bert, METHOD, fully_trained=["cls/predictions/bias"])
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
        if is_quantized(leaf):
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
    with pytest.raises(ValueError, match="the merged layer layer is not finite"):
        merge(frozen, adapters, Lora(rank=1))


def test_a_head_that_diverged_is_refused(bert):
    frozen, adapters = tiny.adapted(bert, METHOD, fully_trained=["cls/predictions/bias"])
    adapters["modules"]["cls/predictions"]["bias"] *= jnp.nan
    with pytest.raises(InputError, match="the trained cls/predictions/bias is not finite"):
        merge(frozen, adapters, METHOD)


def test_merging_takes_nothing_from_its_arguments(bert):
    frozen, adapters = tiny.adapted(bert, METHOD)
    before = tiny.snapshot((frozen, adapters))
    merged = merge(frozen, adapters, METHOD)
    merged["bert"].clear()
    chex.assert_trees_all_equal(tiny.snapshot((frozen, adapters)), before)


METHODS = {
    "lora": METHOD,
    "hira": Hira(rank=4),
    "dora": Lora(rank=4, use_dora=True),
    "ia3": Ia3(),  # scales biases too
    "vera": Vera(rank=4),
    "loha": Loha(rank=4),
    "lokr": Lokr(rank=2),
    "shira": Shira(rank=2),
    "adalora": AdaLora(init_r=4, target_r=2),
}
BASES = {
    "fp32": {},
    "bf16": {"dtype": "bfloat16"},
    "nf4": {"quantization": Quantization()},
    "int8": {"quantization": Quantization("int8")},
}


@pytest.mark.usefixtures("standard_promotion")  # for the model in bf16
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("base", BASES)
def test_unmerging_returns_the_base_bit_for_bit(tiny_models, base, method):
    model = tiny_models("bert", **BASES[base])
    frozen, adapters = tiny.adapted(model, method, fully_trained=["cls/predictions/bias"])
    merged = merge(frozen, adapters, method)
    back = leaf_paths(unmerge(merged, frozen, adapters))
    assert back.keys() == leaf_paths(model.params).keys()
    for path, leaf in leaf_paths(without_shared(frozen)[0]).items():
        chex.assert_trees_all_equal(back[path], leaf)
    chex.assert_trees_all_equal(back["cls/predictions/bias"], adapters["modules"]["cls/predictions"]["bias"])
    path = f"{next(iter(adapters['sites']))}/kernel"
    assert (leaf_paths(merged)[path] != dequantized(back[path])).any()


def dequantized(leaf):
    return dequantize(leaf) if is_quantized(leaf) else leaf


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_merging_into_a_quantised_base_quantises_the_sum_again_and_warns(tiny_models, base):
    model = tiny_models("bert", **BASES[base])
    frozen, adapters = tiny.adapted(model, METHOD)
    with pytest.warns(UserWarning, match="quantises the sum again, which loses accuracy"):
        merged = leaf_paths(merge(frozen, adapters, METHOD, requantize=True))
    exact = leaf_paths(merge(frozen, adapters, METHOD))
    for path, leaf in leaf_paths(frozen).items():
        assert is_quantized(merged[path]) == is_quantized(leaf)
        if path.removesuffix("/kernel") in adapters["sites"]:
            chex.assert_trees_all_equal(merged[path], quantize_like(leaf, exact[path]))
        else:
            chex.assert_trees_all_equal(merged[path], leaf)


def test_requantize_says_nothing_where_nothing_is_quantised(bert):
    frozen, adapters = tiny.adapted(bert, METHOD)
    chex.assert_trees_all_equal(merge(frozen, adapters, METHOD, requantize=True), merge(frozen, adapters, METHOD))


def test_an_embedding_is_merged_as_the_linear_layer_of_its_ids():
    frozen = {"words": {"embedding": jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])}}
    site = {"a": jnp.array([[1.0], [0.0], [2.0]]), "b": jnp.array([[10.0, 20.0]])}
    merged = merge(frozen, {"sites": {"words": site}, "modules": {}}, Lora(rank=1, alpha=0.5))
    np.testing.assert_array_equal(merged["words"]["embedding"], [[6, 12], [3, 4], [15, 26]])


def test_a_bias_of_b_has_nowhere_to_go_without_a_bias():
    frozen = {"layer": {"kernel": jnp.ones((2, 2))}}
    site = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    with pytest.raises(InputError, match="lora_bias cannot be merged into a layer without a bias"):
        merge(frozen, {"sites": {"layer": site}, "modules": {}}, Lora(rank=1, lora_bias=True))
