"""LoRA that leaves the zeros of a pruned base at zero: the layer in training is the merged one, and its file is not for PEFT."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from jaxpeft import BaseInfo, InputError, apply, load_adapter, merge, save_adapter
from jaxpeft.adapters import Hira, Ia3, Lora, Site
from jaxpeft.adapters.build import init_adapters
from jaxpeft.merging import check_has_zeros, dropped_updates
from jaxpeft.quantization import dequantize, is_quantized, quantize

X = jnp.asarray(tiny.normal(0, 8, 16))
IDS = jnp.arange(8) % 6


class Network(nn.Module):
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, ids, deterministic=True):
        x = x + nn.Embed(6, 16, dtype=self.dtype, name="words")(ids)
        return nn.Dense(24, dtype=self.dtype, name="up")(x)


def base(storage="fp32"):
    """Params of which half are zero, and the sites."""
    drawn = {"words": tiny.normal(1, 6, 16), "up": tiny.normal(2, 16, 24)}
    pruned = {name: np.where(np.abs(w) < np.median(np.abs(w)), 0, w) for name, w in drawn.items()}
    kernel = (
        quantize(pruned["up"])
        if storage == "nf4"
        else pruned["up"].astype(storage if storage == "bfloat16" else np.float32)
    )
    params = {"words": {"embedding": pruned["words"]}, "up": {"kernel": kernel, "bias": tiny.normal(3, 24)}}
    return jax.tree.map(jnp.asarray, params), {
        "words": Site("words", 6, 16, "embedding"),
        "up": Site("up", 16, 24),
    }


def adapted(method, storage="fp32", *, only=("words", "up")):
    params, sites = base(storage)
    frozen, adapters = init_adapters(params, method, {path: sites[path] for path in only}, rng=jax.random.key(0))
    for i, site in enumerate(adapters["sites"].values()):
        for j, name in enumerate(sorted(site)):
            site[name] = jnp.asarray(tiny.normal(10 * i + j, *site[name].shape))
    return frozen, adapters


def zeros_of(frozen):
    kernel = frozen["up"]["kernel"]
    dense = dequantize(kernel) if is_quantized(kernel) else kernel
    return {"words": frozen["words"]["embedding"] == 0, "up": dense == 0}


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize(
    "method",
    [Lora(rank=2, keep_base_zeros=True), Lora(rank=2, keep_base_zeros=True, lora_bias=True)],
    ids=["plain", "bias"],
)
def test_the_merged_layer_is_the_trained_one_and_has_the_zeros(method, storage):
    only = ("up",) if method.lora_bias else ("words", "up")
    frozen, adapters = adapted(method, storage, only=only)
    merged = merge(frozen, adapters, method)
    module = Network()
    side = jax.jit(lambda f, a: apply(module, f, a, method, x=X, ids=IDS))(frozen, adapters)
    chex.assert_trees_all_close(side, module.apply({"params": merged}, X, IDS), rtol=1e-6, atol=1e-5)
    found = {"words": merged["words"]["embedding"] == 0, "up": merged["up"]["kernel"] == 0}
    for path in only:
        np.testing.assert_array_equal(found[path], zeros_of(frozen)[path])
        assert found[path].mean() >= 0.5
    costs = dropped_updates(frozen, adapters, method)
    assert {path: cost.dropped for path, cost in costs.items()} == dict.fromkeys(only, 0.0)


def test_in_bf16_and_with_dropout_it_is_the_same_layer(standard_promotion):
    plain, dropping = Lora(rank=2, keep_base_zeros=True), Lora(rank=2, keep_base_zeros=True, dropout=0.5)
    frozen, adapters = adapted(plain, "bfloat16")
    module = Network(jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    merged = merge(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), frozen), adapters, plain)
    exact = Network().apply({"params": merged}, X, IDS)
    side = apply(module, frozen, adapters, plain, x=x, ids=IDS)
    assert side.dtype == jnp.bfloat16
    np.testing.assert_allclose(side.astype(jnp.float32), exact, rtol=0, atol=2**-5 * float(jnp.abs(exact).max()))
    keys = jax.random.split(jax.random.key(1), 400)
    f32, adapters32 = adapted(plain)
    mean = jax.vmap(lambda key: apply(Network(), f32, adapters32, dropping, x=X, ids=IDS, dropout_rng=key))(keys).mean(
        0
    )
    straight = apply(Network(), f32, adapters32, plain, x=X, ids=IDS)
    assert float(jnp.abs(mean - straight).mean()) < 0.1 * float(jnp.abs(straight).mean())


def test_a_zero_of_the_base_has_no_gradient():
    method = Lora(rank=2, keep_base_zeros=True)
    frozen, adapters = adapted(method, only=("up",))
    frozen["up"]["kernel"] = frozen["up"]["kernel"].at[3].set(0)  # nothing of input 3 is used
    loss = lambda a: jnp.square(apply(Network(), frozen, a, method, x=X, ids=IDS)).sum()  # noqa: E731
    grads = jax.grad(loss)(adapters)["sites"]["up"]
    assert not grads["a"][3].any()
    assert grads["a"][4].any()


def test_its_file_is_not_for_peft(tmp_path):
    method = Lora(rank=2, alpha=3.0, keep_base_zeros=True, rank_pattern={"up": 4})
    frozen, adapters = adapted(method)
    save_adapter(tmp_path, adapters, method, base=BaseInfo("x", "BertModel", "bert", None))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "JAXPEFT_LORA"
    _, loaded, again = load_adapter(tmp_path, frozen)
    assert again == method
    chex.assert_trees_all_equal(loaded, adapters)


def test_peft_refuses_the_file(tmp_path):
    peft = pytest.importorskip("peft")
    method = Lora(rank=2, keep_base_zeros=True)
    _, adapters = adapted(method)
    save_adapter(tmp_path, adapters, method, base=BaseInfo("x", "BertModel", "bert", None))
    with pytest.raises((KeyError, ValueError), match="JAXPEFT_LORA"):
        peft.PeftConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "keep_base_zeros and use_dora exclude each other"),
        (
            {"init_lora_weights": "pissa"},
            "keep_base_zeros cannot be used with init_lora_weights 'pissa', which fills the zeros",
        ),
    ],
)
def test_what_it_cannot_be_combined_with(options, message):
    with pytest.raises(InputError, match=message):
        Lora(keep_base_zeros=True, **options)


@pytest.mark.parametrize("method", [Hira(rank=2), Ia3()], ids=["hira", "ia3"])
def test_methods_that_multiply_keep_the_zeros_by_themselves(method):
    frozen, adapters = adapted(method, only=("up",))
    merged = merge(frozen, adapters, method)["up"]["kernel"]
    np.testing.assert_array_equal(merged == 0, zeros_of(frozen)["up"])


@pytest.mark.parametrize("storage", ["fp32", "bfloat16", "nf4"])
def test_a_merge_that_keeps_the_zeros(storage):
    method = Lora(rank=2)
    frozen, adapters = adapted(method, storage)
    full, kept = merge(frozen, adapters, method), merge(frozen, adapters, method, keep_sparsity=True)
    for path, zeros in zeros_of(frozen).items():
        name = "embedding" if path == "words" else "kernel"
        np.testing.assert_array_equal(kept[path][name] == 0, zeros)
        np.testing.assert_array_equal(kept[path][name][~zeros], full[path][name][~zeros])
    chex.assert_trees_all_equal(kept["up"]["bias"], full["up"]["bias"])
    costs = dropped_updates(frozen, adapters, method)
    for path, cost in costs.items():
        update = method.scaling * np.asarray(adapters["sites"][path]["a"] @ adapters["sites"][path]["b"])
        zeros = np.asarray(zeros_of(frozen)[path])
        assert cost.dropped == pytest.approx(np.linalg.norm(update[zeros]) / np.linalg.norm(update), rel=1e-4)
        assert cost.zeros == zeros.mean()


def test_zeros_survive_quantising_again():
    method = Lora(rank=2)
    frozen, adapters = adapted(method, "nf4")
    with pytest.warns(UserWarning, match="quantises the sum again"):
        kept = merge(frozen, adapters, method, requantize=True, keep_sparsity=True)
    assert not dequantize(kept["up"]["kernel"])[zeros_of(frozen)["up"]].any()


def test_a_base_without_zeros_is_refused():
    method = Lora(rank=2)
    frozen, adapters = adapted(method)
    dense = jax.tree.map(lambda leaf: jnp.where(leaf == 0, 1, leaf), frozen)
    with pytest.raises(
        InputError, match="keep_sparsity keeps the zeros of a pruned base, and no adapted layer of this base has any"
    ):
        merge(dense, adapters, method, keep_sparsity=True)
    assert check_has_zeros(frozen, adapters["sites"], "x") == pytest.approx(0.5)
    with pytest.raises(InputError, match="no adapted layer"):
        merge(frozen, {"sites": {}, "modules": {}}, None, keep_sparsity=True)


def test_a_diverged_entry_is_refused_even_where_the_base_is_zero():
    frozen = {"layer": {"kernel": jnp.array([[0.0, 1.0], [1.0, 1.0]])}}
    adapters = {"sites": {"layer": {"a": jnp.array([[jnp.inf], [0.0]]), "b": jnp.array([[1.0, 0.0]])}}, "modules": {}}
    with pytest.raises(InputError, match="not finite"):
        merge(frozen, adapters, Lora(rank=1), keep_sparsity=True)
