"""Packed adapters: small, exact, read like any other, and refused if damaged."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxpeft import BaseInfo, InputError, Lora, cli, load_adapter, save_adapter
from jaxpeft.adapters import Site
from jaxpeft.adapters.build import init_adapters
from jaxpeft.interop.peft.packed import pack, unpack
from jaxpeft.interop.peft.weights import PACKED_FILE, WEIGHTS_FILE
from jaxpeft.pruning import prune

BASE = BaseInfo("somewhere/base", "BertModel", "bert", None)
WIDTH = 384  # MiniLM's, the narrowest of the real models
METHOD = Lora(rank=8)
PARAMS = {"enc": {name: {"kernel": np.ones((WIDTH, WIDTH), np.float32)} for name in ("query", "value")}}


@pytest.fixture(scope="module")
def adapter():
    """`(adapters, masks)`: half of every matrix pruned."""
    sites = {f"enc/{name}": Site(f"enc/{name}", WIDTH, WIDTH) for name in PARAMS["enc"]}
    _, adapters = init_adapters(PARAMS, METHOD, sites, rng=jax.random.key(0))
    for i, site in enumerate(adapters["sites"].values()):
        site["b"] = tiny.normal(i, 8, WIDTH)
    return adapters, prune(adapters["sites"], 0.5)


def save(directory, adapter, **options):
    adapters, masks = adapter
    return save_adapter(directory, adapters, METHOD, base=BASE, masks=masks, **options)


def bytes_of(tensors):
    return {key: (tensor.dtype, tensor.shape, tensor.tobytes()) for key, tensor in tensors.items()}


def test_every_bit_of_a_float_comes_back():
    odd = np.zeros(64, np.float32)
    odd[:4] = -0.0, np.nan, np.inf, np.float32(1e-45)
    tensors = {"odd": odd, "bf16": np.zeros((4, 8), ml_dtypes.bfloat16)}
    stored, _ = pack(tensors)
    assert stored["odd"].shape == (4,)
    assert bytes_of(unpack(*pack(tensors), "file")) == bytes_of(tensors)


def test_the_bits_by_hand():
    stored, metadata = pack({"b": np.float32([[0, 5, 0], [7, 0, 0], [0, 0, 9]]), "a": np.float32([1, 2])})
    assert stored["masks"].tolist() == [0b00001010, 0b1]
    assert stored["b"].tolist() == [5, 7, 9]
    assert stored["a"].tolist() == [1, 2]
    assert metadata == {"format": "jaxpeft.packed", "version": "1", "shapes": "[null,[3,3]]"}


def test_half_of_an_adapter_is_at_most_56_percent_of_its_file(adapter, tmp_path):
    dense, packed = save(tmp_path / "dense", adapter), save(tmp_path / "packed", adapter, packed=True)
    assert (dense.name, packed.name) == (WEIGHTS_FILE, PACKED_FILE)
    assert packed.stat().st_size <= 0.56 * dense.stat().st_size


def test_a_packed_adapter_loads_like_any_other(adapter, tmp_path):
    save(tmp_path / "dense", adapter)
    save(tmp_path / "packed", adapter, packed=True)
    (_, dense, method), (_, packed, packed_method) = (
        load_adapter(tmp_path / name, PARAMS) for name in ("dense", "packed")
    )
    jax.tree.map(np.testing.assert_array_equal, packed, dense)
    assert packed_method == method


def test_saving_again_in_another_form_leaves_one_file(adapter, tmp_path):
    for packed in (False, True, False):
        file = save(tmp_path, adapter, packed=packed)
        assert sorted(tmp_path.glob("*.safetensors")) == [file]


def test_two_files_of_weights_are_refused(adapter, tmp_path):
    file = save(tmp_path, adapter)
    (tmp_path / PACKED_FILE).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"has adapter_model\.safetensors and adapter_model\.packed.* remove the one"):
        load_adapter(tmp_path, PARAMS)


def test_the_commands_pack_and_unpack(adapter, tmp_path, capsys):
    dense = save(tmp_path / "dense", adapter)
    (tmp_path / "dense" / "README.md").write_text("a card")
    cli.main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed")])
    cli.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")])
    files = {path.name: path.read_bytes() for path in dense.parent.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert (tmp_path / "packed" / "README.md").read_text() == "a card"
    assert not (tmp_path / "packed" / WEIGHTS_FILE).exists()
    assert "0.050 MB → 0.027 MB" in capsys.readouterr().out
    for command, name, message in (
        ("pack", "packed", "is packed already"),
        ("unpack", "dense", "is not packed"),
        ("pack", "nowhere", "no adapter_config.json in"),
    ):
        with pytest.raises(SystemExit):
            cli.main([command, str(tmp_path / name), str(tmp_path / "new")])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()


def with_metadata(**changed):
    return lambda stored, metadata: (stored, {**metadata, **changed})


def with_stored(**changed):
    return lambda stored, metadata: (
        {**stored, **{key: change(stored[key]) for key, change in changed.items()}},
        metadata,
    )


DAMAGES = {
    "too-few-values": (with_stored(b=lambda b: b[1:]), r"the mask of 'b' keeps 3 of 9 entries, and its values have shape \(2,\)"),
    "too-many-values": (with_stored(b=lambda b: np.append(b, b)), "the mask of 'b' keeps 3 of 9 entries"),
    "values-in-two-axes": (with_stored(b=lambda b: b[None]), r"values have shape \(1, 3\)"),
    "a-bit-behind-the-last": (with_stored(masks=lambda m: m | np.uint8([0, 2])), "the mask of 'b' keeps 4 of 9"),
    "mask-too-short": (with_stored(masks=lambda m: m[:1]), r"its masks are uint8 of shape \(1,\), and its shapes ask for 2 bytes"),
    "mask-of-floats": (with_stored(masks=lambda m: m.astype(np.float32)), "its masks are float32"),
    "no-masks": (lambda stored, metadata: ({k: v for k, v in stored.items() if k != "masks"}, metadata), r"shape \(0,\)"),
    "unknown-version": (with_metadata(version="2"), "has version '2' of the packed format, and this jaxpeft reads version 1"),
    "another-format": (with_metadata(format="pt"), "is no packed adapter: the format in its metadata is 'pt'"),
    "no-metadata": (lambda stored, metadata: (stored, None), "is no packed adapter: .* is None"),
    "no-shapes": (lambda stored, metadata: (stored, {**metadata, "shapes": "["}), "does not list the shapes of its 2 tensors"),
    "a-shape-too-few": (with_metadata(shapes="[null]"), "does not list the shapes of its 2 tensors"),
    "a-shape-of-text": (with_metadata(shapes='[null,["3",3]]'), "does not list the shapes of its 2 tensors"),
    "a-huge-shape": (with_metadata(shapes="[null,[1000000000,1000000000]]"), "shapes ask for 125000000000000000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(name):
    damage, message = DAMAGES[name]
    packed = pack({"b": np.float32([[0, 5, 0], [7, 0, 0], [0, 0, 9]]), "a": np.float32([1, 2])})
    with pytest.raises(InputError, match=message) as error:
        unpack(*damage(*packed), "the file")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("the file ")


def test_a_truncated_file_is_refused_in_one_line(adapter, tmp_path):
    file = save(tmp_path, adapter, packed=True)
    whole = file.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read") as error:
            load_adapter(tmp_path, PARAMS)
        assert "\n" not in str(error.value)


def test_a_file_without_a_value_is_refused_when_it_is_loaded(adapter, tmp_path):
    file = save(tmp_path, adapter, packed=True)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({**tensors, key: tensors[key][1:]}, file, metadata=metadata)
    with pytest.raises(InputError, match=rf"{PACKED_FILE} is damaged: the mask of '{key}' keeps 1536 of 3072"):
        load_adapter(tmp_path, PARAMS)
    assert json.loads(metadata["shapes"]) == [[8, 384], [384, 8]] * 2
