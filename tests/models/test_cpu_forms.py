"""Attention and GELU in the forms that are fast on a CPU: the answers, gradients and dropout of the model's own."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from tiers import slow_but

from jaxpeft.adapters import Lora
from jaxpeft.models.activation import activation_overrides, gelu
from jaxpeft.models.dense_attention import attend
from jaxpeft.training.objective import Objective


@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("broadcast", [True, False])
def test_dense_attention_is_flax_s(heads, broadcast):
    """Values and gradients, for some of the queries, with padding and dropout; three heads are not divided."""
    query, key, value, weight = (tiny.normal(seed, 2, n, heads, 8) for seed, n in enumerate((5, 9, 9, 5)))
    real = np.arange(9) < np.array([[9], [6]])
    rng = jax.random.key(0)
    shape = (1, 1, 5, 9) if broadcast else (2, heads, 5, 9)
    kept = jax.random.bernoulli(rng, 0.75, shape).astype(jnp.float32) / 0.75

    def ours(query, key, value):
        return (attend(query, key, value, real[:, None, None], kept, parts=2) * weight).sum()

    def flax_s(query, key, value):
        weights = nn.dot_product_attention_weights(
            query, key, mask=real[:, None, None], dropout_rng=rng, dropout_rate=0.25,
            broadcast_dropout=broadcast, deterministic=False,
        )  # fmt: skip
        return (jnp.einsum("...hqk,...khd->...qhd", weights, value) * weight).sum()

    found, expected = (jax.value_and_grad(f, (0, 1, 2))(query, key, value) for f in (ours, flax_s))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_gelu_by_erf():
    x = jnp.linspace(-8, 8, 4001)
    expected = nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu(x), expected, rtol=1e-6, atol=2e-6)
    slope, expected = (jax.vmap(jax.grad(f))(x) for f in (gelu, lambda x: nn.gelu(x, approximate=False)))
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=2e-6)


def test_gelu_in_bf16_is_only_rounded():
    x = jnp.linspace(-4, 4, 801).astype(jnp.bfloat16)
    assert gelu(x).dtype == jnp.bfloat16
    expected = gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gelu(x).astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize("model_type", slow_but(tiny.CONFIGS, "bert", "distilbert"))
@pytest.mark.parametrize("task", slow_but(["masked-lm", "classification"], "masked-lm"))
def test_a_step_is_that_of_the_model_s_own(tiny_models, model_type, task):
    """Loss and gradients, with dropout and padding; every family, also those that have no such forms. In float64, so that rounding, which
    differs, does not matter."""
    method = Lora(rank=4)
    model = tiny_models(model_type, task, dropout=0.2)
    frozen, adapters = tiny.adapted(model, method)
    batch = tiny.batch(task=task)

    def step(objective, frozen, adapters):
        def loss(adapters):
            return objective.loss(objective.logits(frozen, adapters, {}, batch, jax.random.key(1)), batch)[0]

        return jax.jit(jax.value_and_grad(loss))(adapters)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double, frozen, adapters = tiny.doubled(model, frozen, adapters)
        own = Objective(double, method, tiny.task_of(model))
        found, expected = (step(replace(own, on_cpu=on_cpu), frozen, adapters) for on_cpu in (True, False))
        chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-7)


def test_another_activation_is_left_alone(tiny_models):
    assert activation_overrides(tiny_models("bert"))
    assert activation_overrides(tiny_models("bert", config={"hidden_act": "gelu_new"})) == {}
    assert activation_overrides(tiny.Toy()) == {}
