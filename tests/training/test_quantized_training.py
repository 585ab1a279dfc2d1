"""That a 4-bit base is 4 bits in the memory of the process: what is held, and what a training step makes of it."""

import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from tiers import slow

from jaxpeft.adapters import Hira, Lora, S2ft, Shira, Site
from jaxpeft.adapters.build import init_adapters
from jaxpeft.inject import apply
from jaxpeft.merging import merge
from jaxpeft.models.build import Quantization
from jaxpeft.quantization import is_quantized, quantize
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import make_train_step
from jaxpeft.trees import beside_model, leaf_paths

NF4 = {"quantization": Quantization()}
METHODS = {"lora": Lora(rank=2, dropout=0.1), "hira": Hira(rank=2)}


def tensors(frozen):
    return [leaf for leaf in leaf_paths(frozen).values() if is_quantized(leaf)]


@pytest.mark.parametrize(
    "method",
    [*METHODS.values(), *(pytest.param(method, marks=slow) for method in (Shira(rank=1), S2ft(channels=3)))],
    ids=lambda method: method.name,
)
def test_nothing_of_a_kernel_s_size_is_saved_for_the_backward_pass(tiny_models, method):
    """The arrays that `jax.vjp` keeps, of a 4-bit base and, to see that it would show, of the same base dequantised."""
    model = tiny_models("bert", **NF4)
    frozen, adapters = tiny.adapted(model, method)
    inputs = model.inputs(tiny.batch(2))
    shapes = {tensor.shape for tensor in tensors(frozen)}
    assert shapes == {(32, 32), (32, 48), (48, 32)}

    def saved(base):
        def logits(a):
            return apply(model.module, base, a, method, dropout_rng=jax.random.key(0), **inputs).logits

        _, pull_back = jax.vjp(logits, adapters)
        return [leaf for leaf in jax.tree.leaves(pull_back) if leaf.dtype == np.float32 and leaf.shape in shapes]

    plain = {**merge(frozen, {"sites": {}, "modules": {}}), **beside_model(frozen)}
    assert len(saved(plain)) >= 10  # all 13 but the lowest layer's three, below which nothing trains
    # The head's, which is not in 4 bits, stays.
    assert [leaf.shape for leaf in saved(frozen)] == [(32, 32)]


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        for i in range(8):
            x = nn.gelu(nn.Dense(128, name=str(i))(x))
        return x


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_compiled_step_never_holds_the_base_in_full(method):
    """XLA's own account of eight kernels, 0.52 MB in fp32: forward and backward, one is there at a time."""
    x, kernels = jnp.ones((2, 128)), [tiny.normal(i, 128, 128, scale=0.1) for i in range(8)]
    params = {str(i): {"kernel": quantize(kernel), "bias": jnp.zeros(128)} for i, kernel in enumerate(kernels)}
    targets = {"0": Site("0", 128, 128)}
    frozen, adapters = init_adapters(params, method, targets, rng=jax.random.key(0))

    def temporaries(base):
        def loss(a, base):
            return jnp.square(apply(Tower(), base, a, method, dropout_rng=jax.random.key(1), x=x)).sum()

        return jax.jit(jax.grad(loss)).lower(adapters, base).compile().memory_analysis().temp_size_in_bytes

    full = sum(4 * tensor.size for tensor in tensors(frozen))
    assert full == 8 * 128**2 * 4
    # HiRA's own A·B and its gradient are full matrices, three of them at its one site.
    assert temporaries(frozen) < full / 3 + (3 * full / 8 if method.name == "hira" else 0)


def test_training_is_that_on_the_dequantised_base_and_leaves_the_codes_as_they_are():
    """On four devices, against one; dropout of base and adapter included."""
    model, parallel, method = tiny.Toy(quantized=True), data_parallel(), METHODS["lora"]
    objective, optimizer, frozen, state = tiny.training(model, method)
    before, placed = tiny.snapshot(frozen), parallel.replicate(frozen)
    step, plain = make_train_step(objective, optimizer), merge(frozen, {"sites": {}, "modules": {}})
    expected, _ = step(jax.tree.map(jnp.copy, state), plain, tiny.batch())
    state, metrics = step(parallel.replicate(state), placed, parallel.shard(tiny.batch()))
    chex.assert_trees_all_equal(tiny.snapshot(placed), before)
    chex.assert_tree_all_finite((state.adapters, metrics))
    chex.assert_trees_all_close(tiny.snapshot(state.adapters), tiny.snapshot(expected.adapters), rtol=1e-5, atol=1e-6)


def test_the_live_bytes_of_bert_base_s_linear_layers(tiny_models):
    """Two layers of BERT-base's widths: 14.2 million weights at 4.127 bits, and no other copy of them alive."""
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    model = tiny_models("bert", config=config, **NF4)
    gc.collect()
    new = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    held = tensors(model.params)
    weights = sum(tensor.size for tensor in held)
    assert weights == 2 * (4 * 768**2 + 2 * 768 * 3072)
    linear = sum(leaf.nbytes for leaf in jax.tree.leaves(held))
    assert 8 * linear / weights <= 4.2
    rest = {path: leaf for path, leaf in leaf_paths(model.params).items() if not is_quantized(leaf)}
    assert not [path for path in rest if "encoder" in path and path.endswith("kernel")]
    assert new == linear + sum(leaf.nbytes for leaf in rest.values())


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 0), ("tpu", 2), ("cuda", 2)])
def test_accelerators_are_told_by_barriers(platform, barriers):
    """One before the forward and one before the backward kernel; on a CPU XLA would remove them (`recompute.py`)."""
    params = {"0": {"kernel": quantize(tiny.normal(0, 128, 128)), "bias": jnp.zeros(128)}}

    def loss(x):
        return apply(One(), params, {"sites": {}, "modules": {}}, x=x).sum()

    lowered = jax.jit(jax.grad(loss)).trace(jnp.ones((2, 128))).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("optimization_barrier") == barriers


class One(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return jnp.square(nn.Dense(128, name="0")(x))
