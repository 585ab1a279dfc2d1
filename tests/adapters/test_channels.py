"""A layer at some of its channels is the whole layer with the other inputs zeroed, at the chosen outputs; with gradients."""

import chex
import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxpeft.adapters import Lokr, Lora, Site
from jaxpeft.adapters.base import FrozenLayer
from jaxpeft.adapters.channels import Channels, forward

KERNEL, BIAS = jnp.asarray(tiny.normal(0, 6, 4)), jnp.asarray(tiny.normal(1, 4))
LAYER = FrozenLayer(lambda x: x @ KERNEL + BIAS, KERNEL.astype, BIAS, jnp.float32)
SOME_INPUTS, SOME_OUTPUTS = jnp.array([4, 0, 1]), jnp.array([3, 1])
CHANNELS = {
    "inputs": Channels(inputs=SOME_INPUTS),
    "outputs": Channels(outputs=SOME_OUTPUTS),
    "both": Channels(SOME_INPUTS, SOME_OUTPUTS),
}


@pytest.mark.parametrize("method", [None, Lora(rank=2, use_dora=True), Lokr(rank=2)], ids=["none", "dora", "lokr"])
def test_a_cut_layer_is_the_layer_with_zeros(method):
    """DoRA is cut at its outputs and computed whole at its inputs; LoKr is always computed whole."""
    params = method.init(jax.random.key(0), Site("layer", 6, 4), lambda: KERNEL) if method else {}
    params = {name: leaf + tiny.normal(i, *leaf.shape) for i, (name, leaf) in enumerate(params.items(), 2)}
    x, weight = jnp.asarray(tiny.normal(9, 5, 6)), jnp.asarray(tiny.normal(10, 5, 4))

    @jax.jit
    def both(x, params):
        def cut(x, params, channels):
            own = x if channels.inputs is None else x[:, channels.inputs]
            return forward(method, own, params, LAYER, None, channels)

        def zeroed(x, params, channels):
            left = x if channels.inputs is None else jnp.zeros_like(x).at[:, channels.inputs].set(x[:, channels.inputs])
            y = method.forward(left, params, LAYER, None) if method else LAYER.base(left)
            return y if channels.outputs is None else y[:, channels.outputs]

        def of(layer, channels):
            def loss(x, params):
                y = layer(x, params, channels)
                return (y * weight[:, : y.shape[1]]).sum(), y

            return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)

        return [{name: of(layer, channels) for name, channels in CHANNELS.items()} for layer in (cut, zeroed)]

    found, expected = both(x, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
