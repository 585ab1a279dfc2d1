"""Flax's msgpack files, leaf by leaf: what `flax.serialization` writes, read without reading the rest."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import flatten_dict

from jaxpeft.errors import InputError
from jaxpeft.models.msgpack_files import msgpack_leaves

TREE = {
    "bert": {
        "embeddings": {"word_embeddings": {"embedding": np.arange(600, dtype=np.float32).reshape(100, 6)}},
        "encoder": {"layer": {str(i): {"kernel": jnp.full((3, 2), i, jnp.bfloat16)} for i in range(20)}},
    },
    "bias": np.zeros(3, np.float32),
}


@pytest.mark.parametrize("chunk_bytes", [2**30, 64], ids=["whole", "in-chunks"])
def test_every_leaf_is_what_flax_restores(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk_bytes)  # flax cuts arrays of more than 1 GB
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(serialization.msgpack_serialize(serialization.to_state_dict(TREE)))
    assert (b"__msgpack_chunked_array__" in file.read_bytes()) == (chunk_bytes == 64)
    leaves = msgpack_leaves(file)
    expected = flatten_dict(serialization.msgpack_restore(file.read_bytes()), sep="/")
    assert list(leaves) == list(expected)
    for path, read in leaves.items():
        assert read().dtype == expected[path].dtype
        np.testing.assert_array_equal(read(), expected[path])


def test_a_leaf_is_read_from_its_own_bytes_alone(tmp_path):
    """What is not asked for may be destroyed in the meantime: nothing of it was kept."""
    file = tmp_path / "flax_model.msgpack"
    data = serialization.msgpack_serialize(serialization.to_state_dict(TREE))
    file.write_bytes(data)
    leaves = msgpack_leaves(file)
    begin = data.index(np.asarray(TREE["bert"]["embeddings"]["word_embeddings"]["embedding"]).tobytes())
    file.write_bytes(data[:begin] + bytes(2400) + data[begin + 2400 :])
    assert not leaves["bert/embeddings/word_embeddings/embedding"]().any()
    np.testing.assert_array_equal(leaves["bert/encoder/layer/7/kernel"](), np.full((3, 2), 7, np.float32))


@pytest.mark.parametrize(
    "spoil", [lambda data: data[:-20], lambda data: data[:1], lambda data: b"", lambda data: b"\x93" + data]
)
def test_what_is_no_whole_file_is_refused(tmp_path, spoil):
    file = tmp_path / "flax_model.msgpack"
    file.write_bytes(spoil(serialization.msgpack_serialize(serialization.to_state_dict(TREE))))
    with pytest.raises(
        InputError, match=r"flax_model\.msgpack cannot be read as Flax msgpack: .*; fetch it again"
    ) as caught:
        msgpack_leaves(file)
    assert "\n" not in str(caught.value)
