"""(IA)³: where l stands, what it scales, and whose name decides."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft import InputError, apply, merge
from jaxpeft.adapters import FrozenLayer, Ia3, Site
from jaxpeft.adapters.build import init_adapters

W, BIAS, X = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([10.0, 20.0]), jnp.ones((1, 2))


def layer(kernel=W, bias=BIAS, dtype=jnp.float32):
    return FrozenLayer(lambda x: x @ kernel.astype(dtype) + bias.astype(dtype), kernel.astype, bias, dtype)


def test_the_output_is_scaled_with_its_bias_by_hand():
    method, params = Ia3(feedforward_modules=["down"]).at("layer/up"), {"l": jnp.array([[2.0, 3.0]])}
    np.testing.assert_array_equal(method.kernel(W, params), [[2, 6], [6, 12]])
    np.testing.assert_array_equal(method.adapted_bias(BIAS, params), [20, 60])
    assert method.adapted_bias(None, params) is None
    np.testing.assert_array_equal(method.forward(X, params, layer(), None), [[28, 78]])


def test_the_input_is_scaled_and_the_bias_is_not_by_hand():
    method, params = Ia3(feedforward_modules=["down"]).at("layer/down"), {"l": jnp.array([[2.0], [3.0]])}
    np.testing.assert_array_equal(method.kernel(W, params), [[2, 4], [9, 12]])
    assert method.adapted_bias(BIAS, params) is BIAS
    np.testing.assert_array_equal(method.forward(X, params, layer(), None), [[21, 36]])


NAMES = (
    "bert/encoder/layer/0/output/dense",
    "bert/encoder/layer/1/attention/output/dense",
    "q_lin",
    "ffn/lin2",
    "lin2",
)
MODULES = (
    [],
    ["output.dense"],
    ["dense", "lin2"],
    ["in2"],
    ["0.output.dense"],
    r".*\.1\..*dense",
    "lin2",
    "dense",
    ".*lin.",
)


@pytest.mark.parametrize("modules", MODULES, ids=str)
def test_the_layers_scaled_at_their_input_are_peft_s(modules):
    from peft import IA3Config
    from peft.tuners.ia3 import IA3Model

    config = IA3Config(feedforward_modules=modules)
    for path in NAMES:
        method = Ia3(feedforward_modules=modules).at(path)
        expected = IA3Model._check_target_module_feedforward(config, path.replace("/", "."))
        assert method.scales_input == method.at(path).scales_input == expected, path
        assert method.shapes(Site(path, 3, 5)) == {"l": (3, 1) if expected else (1, 5)}


def test_in_bf16_the_scale_itself_is_not_rounded():
    """Around 1 bf16 has steps of 2⁻⁷: 1.003 would be 1, and nothing would be scaled."""
    x = jnp.full((1, 4), 1.9921875, jnp.bfloat16)
    same = FrozenLayer(lambda x: x, x.astype, None, jnp.bfloat16)
    out = Ia3().forward(x, {"l": jnp.full((1, 4), 1.003)}, same, None)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 2.0)


def test_an_embedding_a_bad_expression_and_masks_are_refused():
    toy = tiny.Toy()
    with pytest.raises(InputError, match="ia3 cannot adapt the embedding 'embed'"):
        init_adapters(toy.params, Ia3(), {"embed": Site("embed", tiny.VOCABULARY, 16, "embedding")}, rng=None)
    with pytest.raises(InputError, match=r"feedforward_modules '\*down' is not a regular expression: .*write a list"):
        Ia3(feedforward_modules="*down").at("down")
    frozen, adapters = tiny.adapted(toy, Ia3(), target_modules=["up"])
    masks = tiny.half_masks(adapters)
    for use in (merge, lambda *a, **kw: apply(toy.module, *a, **kw, **toy.inputs(tiny.batch(1)))):
        with pytest.raises(InputError, match=r"ia3 cannot be pruned.*set pruning\.sparsity to 0"):
            use(frozen, adapters, Ia3(), masks=masks)
