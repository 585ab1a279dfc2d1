"""What `forward` must not build: anything as large as a kernel, in the forward or the backward pass."""

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.extend import core

from jaxpeft.adapters import FrozenLayer, Ia3, Loha, Lokr, SharesFactors, Site, Vera

SITE = Site("layer", 96, 160)
METHODS = {
    "ia3": Ia3(),
    "ia3-input": Ia3(feedforward_modules=["layer"]),
    "vera": Vera(rank=16),
    "loha": Loha(rank=4),
    "lokr": Lokr(rank=4, decompose_both=True),
    "lokr-full": Lokr(rank=16),
}


def sizes(jaxpr):
    """Elements of every array that a program makes, in its inner programs too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, core.ClosedJaxpr | core.Jaxpr)):
            if isinstance(value, core.ClosedJaxpr | core.Jaxpr):
                yield from sizes(value.jaxpr if isinstance(value, core.ClosedJaxpr) else value)


@pytest.mark.parametrize("name", METHODS)
def test_nothing_as_large_as_the_kernel_is_built(name):
    method = METHODS[name].at(SITE.path)
    params = method.init(jax.random.key(0), SITE, None)
    shared = method.init_shared(jax.random.key(0), {SITE.path: SITE}) if isinstance(method, SharesFactors) else {}
    layer = FrozenLayer(lambda x: jnp.pad(x, ((0, 0), (0, 64))), None, None, jnp.float32)

    def loss(params, x):
        return jnp.square(method.forward(x, {**shared, **params}, layer, None)).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(tiny.normal(0, 3, 96)))
    assert max(sizes(jaxpr.jaxpr)) < SITE.d_in * SITE.d_out / 2
