import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.quantization import quantize
from jaxpeft.trees import by_layer, by_leaf, count, join, leaf_paths, nest, size_bytes, split, under

PARAMS = {"a": {"b": {"kernel": 1, "bias": 2}, "c": {"scale": 3}}, "d": {"kernel": 4}}


def test_leaves_come_in_the_order_of_their_paths():
    assert list(leaf_paths(PARAMS).items()) == [
        ("a/b/bias", 2),
        ("a/b/kernel", 1),
        ("a/c/scale", 3),
        ("d/kernel", 4),
    ]
    assert nest(leaf_paths(PARAMS)) == PARAMS


def test_by_layer_and_back():
    leaves = leaf_paths(PARAMS)
    assert by_layer(leaves) == {"a/b": {"bias": 2, "kernel": 1}, "a/c": {"scale": 3}, "d": {"kernel": 4}}
    assert by_leaf(by_layer(leaves)) == leaves


@pytest.mark.parametrize("params", [PARAMS, {"kernel": 1, "bias": 2}, {"kernel": 1, "a": {"bias": 2}}])
@pytest.mark.parametrize("chosen", [(), ("kernel",), ("kernel", "bias", "scale")])
def test_join_undoes_split(params, chosen):
    rest, layers = split(params, lambda path: path.rpartition("/")[2] in chosen)
    assert join(rest, layers) == params
    assert not set(leaf_paths(rest)) & set(by_leaf(layers))


def test_join_takes_what_stands_in_both_from_the_layers():
    assert join(PARAMS, {"d": {"kernel": 5}}) == {**PARAMS, "d": {"kernel": 5}}


def test_under_ends_at_whole_names():
    assert under("a/b/kernel", ["a/b"])
    assert under("a/b", ["a/b"])
    assert not under("a/bc/kernel", ["a/b"])


def test_counts_and_bytes():
    tensor = quantize(np.ones((64, 4), np.float32), double_quantization=False)
    tree = {"x": jnp.zeros((3, 2), jnp.bfloat16), "y": {"kernel": tensor}}
    assert count(tree) == 6 + 256
    assert size_bytes(tree) == 12 + 128 + 4 * 4
