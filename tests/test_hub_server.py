"""The loopback hub, asked by the real clients in subprocesses."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

MODEL = "org/tiny-bert"
WIKITEXT = "Salesforce/wikitext"
GLUE = "nyu-mll/glue"
WEIGHTS = bytes(range(256)) * 40

HUB_CLIENT = """
import json, pathlib
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

def error(call):
    try:
        call()
    except Exception as caught:
        return type(caught).__name__

root = pathlib.Path(snapshot_download("org/tiny-bert", allow_patterns=["*.json", "*.safetensors"]))
snapshot_download("org/tiny-bert", allow_patterns=["*.json", "*.safetensors"])
api = HfApi()
info = api.model_info("org/tiny-bert")
result = {
    "files": sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()),
    "weights": (root / "model.safetensors").read_bytes().hex(),
    "snapshot": root.name,
    "sha": info.sha,
    "listed": sorted(api.list_repo_files("org/tiny-bert")),
    "tree": sorted(entry.path for entry in api.list_repo_tree("org/tiny-bert", recursive=True)),
    "paths": [entry.size for entry in api.get_paths_info("org/tiny-bert", ["model.safetensors", "absent"])],
    "errors": [
        error(lambda: api.model_info("org/absent")),
        error(lambda: hf_hub_download("org/tiny-bert", "absent.txt")),
        error(lambda: hf_hub_download("org/tiny-bert", "config.json", revision="absent")),
    ],
}
print(json.dumps(result))
"""

TRANSFORMERS_CLIENT = """
import json
from transformers import AutoConfig, AutoTokenizer
config = AutoConfig.from_pretrained("org/tiny-bert")
tokenizer = AutoTokenizer.from_pretrained("org/tiny-bert")
print(json.dumps({"model_type": config.model_type, "ids": tokenizer("hello world")["input_ids"]}))
"""

DATASETS_CLIENT = """
import json
from datasets import load_dataset
wikitext = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")
sst2 = load_dataset("nyu-mll/glue", "sst2")
print(json.dumps({
    "wikitext": {split: rows["text"][:] for split, rows in wikitext.items()},
    "sst2": {split: rows.to_list() for split, rows in sst2.items()},
    "label": sst2["train"].features["label"].names,
}))
"""


def write_model(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 32}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]))
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (directory / "onnx").mkdir()
    (directory / "onnx" / "config.json").write_text("{}")
    return directory


def write_dataset(directory: Path, files: dict[str, pa.Table], readme: str) -> Path:
    """Parquet files at `config/split-00000-of-00001.parquet`, with the hub's front matter."""
    for name, table in files.items():
        path = directory / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    (directory / "README.md").write_text(f"---\n{readme}---\n# A dataset\n")
    return directory


def write_wikitext(directory: Path) -> Path:
    names = [f"wikitext-2-raw-v1/{split}" for split in ("test", "train", "validation")]
    files = {name: pa.table({"text": ["", f" = {name} = \n"]}) for name in names}
    files |= {name.replace("2-raw", "103-raw"): pa.table({"text": ["not asked for"]}) for name in names}
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("test", "train", "validation"))
        for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
    )
    return write_dataset(directory, files, f"configs:\n{configs}")


def write_sst2(directory: Path) -> Path:
    columns = {"sentence": ["good", "bad"], "label": pa.array([1, 0], pa.int64()), "idx": pa.array([0, 1], pa.int32())}
    files = {f"sst2/{split}": pa.table(columns) for split in ("train", "validation")}
    readme = """\
dataset_info:
- config_name: sst2
  features:
  - name: sentence
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': negative
          '1': positive
  - name: idx
    dtype: int32
configs:
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train-*
  - split: validation
    path: sst2/validation-*
"""
    return write_dataset(directory, files, readme)


@pytest.fixture(name="server")
def _server(tmp_path):
    models = {MODEL: write_model(tmp_path / "model")}
    datasets = {WIKITEXT: write_wikitext(tmp_path / "wikitext"), GLUE: write_sst2(tmp_path / "glue")}
    with HubServer(models=models, datasets=datasets) as server:
        yield server


@pytest.fixture(name="run_client")
def _run_client(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy that answers nothing must not be asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the caller's switch must not reach the client

    def run(code):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=server.environment(tmp_path / "hf_home"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def get(url, **headers):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever the environment's proxies
    return opener.open(urllib.request.Request(url, headers=headers), timeout=30)


def test_huggingface_hub(server, run_client):
    result = run_client(HUB_CLIENT)
    assert result["files"] == ["config.json", "model.safetensors", "onnx/config.json", "tokenizer_config.json"]
    assert bytes.fromhex(result["weights"]) == WEIGHTS
    assert result["snapshot"] == result["sha"]
    assert result["listed"] == sorted([*result["files"], "README.md", "vocab.txt"])
    assert result["tree"] == sorted([*result["listed"], "onnx"])
    assert result["paths"] == [len(WEIGHTS)]
    assert result["errors"] == ["RepositoryNotFoundError", "EntryNotFoundError", "RevisionNotFoundError"]
    assert sorted(server.downloads) == [f"{MODEL}/{name}" for name in result["files"]]  # each once: then from the cache


@pytest.mark.slow
def test_transformers(server, run_client):
    assert run_client(TRANSFORMERS_CLIENT) == {"model_type": "bert", "ids": [2, 5, 6, 3]}
    assert f"{MODEL}/vocab.txt" in server.downloads
    assert f"{MODEL}/model.safetensors" not in server.downloads


def test_datasets(server, run_client):
    result = run_client(DATASETS_CLIENT)
    expected = {split: ["", f" = wikitext-2-raw-v1/{split} = \n"] for split in ("test", "train", "validation")}
    assert result["wikitext"] == expected
    rows = [{"sentence": "good", "label": 1, "idx": 0}, {"sentence": "bad", "label": 0, "idx": 1}]
    assert result["sst2"] == {"train": rows, "validation": rows}
    assert result["label"] == ["negative", "positive"]
    assert f"{GLUE}/sst2/train-00000-of-00001.parquet" in server.downloads
    assert not any("103" in path for path in server.downloads)


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=500-", 500, None), ("bytes=-7", -7, None)],
)
def test_range(server, wanted, start, stop):
    with get(f"{server.endpoint}/{MODEL}/resolve/main/model.safetensors", Range=wanted) as response:
        assert response.status == 206
        assert response.read() == WEIGHTS[start:stop]
        assert response.headers["Content-Range"].endswith(f"/{len(WEIGHTS)}")


@pytest.mark.parametrize(
    ("path", "wanted", "status", "code"),
    [
        ("/org/absent/resolve/main/config.json", "", 404, "RepoNotFound"),
        (f"/datasets/{MODEL}/resolve/main/config.json", "", 404, "RepoNotFound"),
        (f"/{MODEL}/resolve/main/absent", "", 404, "EntryNotFound"),
        (f"/{MODEL}/resolve/main/%2e%2e/glue/README.md", "", 404, "EntryNotFound"),
        (f"/api/models/{MODEL}/tree/main/absent", "", 404, "EntryNotFound"),
        (f"/api/models/{MODEL}/revision/v2", "", 404, "RevisionNotFound"),
        (f"/{MODEL}/resolve/main/model.safetensors", "bytes=99999-", 416, None),
    ],
)
def test_refusals(server, path, wanted, status, code):
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(server.endpoint + path, Range=wanted)
    assert caught.value.code == status
    assert caught.value.headers["X-Error-Code"] == code
    caught.value.close()


def test_the_port_is_free_after_the_block():
    with HubServer() as server:
        endpoint = server.endpoint
    with pytest.raises(urllib.error.URLError):
        get(f"{endpoint}/api/models/{MODEL}")
