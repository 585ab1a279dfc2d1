"""The configs of DistilBERT and BERT-base, end to end against a loopback hub: the real downloads, at a size that fits a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pytest
from hub_server import HubServer
from test_hub_server import write_dataset

ROOT = Path(__file__).parent.parent
PARAGRAPHS = [p for topic in sorted(topics) for p in topics[topic].split("\n\n")][:600]
WORDS = sorted({word for p in PARAGRAPHS for word in p.lower().split() if word.isalpha()})[:500]
SHORT = [
    *("--training.num_steps", "8", "--training.warmup_steps", "2", "--training.eval_every_steps", "4"),
    *("--pruning.every_steps", "1", "--data.max_length", "32", "--training.batch_size", "8"),
]


def write_model(directory: Path, model_type: str) -> Path:
    """A tiny checkpoint with its head and tokenizer, saved by torch as the hub's are."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    directory.mkdir(parents=True)
    (directory / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizerFast(str(directory / "vocab.txt")).save_pretrained(directory)
    size = {"vocab_size": len(vocabulary), "max_position_embeddings": 64}
    if model_type == "distilbert":
        config = transformers.DistilBertConfig(**size, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
        model = transformers.DistilBertForMaskedLM(config)
    else:
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
        model = transformers.BertForMaskedLM(
            transformers.BertConfig(**size, **heads, hidden_size=64, intermediate_size=64)
        )
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    text = {
        split: pa.table({"text": PARAGRAPHS[start::3]}) for start, split in enumerate(("train", "validation", "test"))
    }
    labelled = {split: labelled_rows(i, split) for i, split in enumerate(("train", "validation", "test"))}
    datasets = {
        "Salesforce/wikitext": write_hub_dataset(root / "wikitext", "wikitext-2-raw-v1", text),
        "nyu-mll/glue": write_hub_dataset(root / "glue", "sst2", labelled),
    }
    models = {
        "distilbert/distilbert-base-uncased": write_model(root / "distilbert", "distilbert"),
        "google-bert/bert-base-uncased": write_model(root / "bert", "bert"),
    }
    with HubServer(models=models, datasets=datasets) as server:
        yield server


def labelled_rows(start: int, split: str) -> pa.Table:
    """Rows as GLUE has them: the test split's labels are all -1."""
    sentences = PARAGRAPHS[start::9]
    labels = [-1 if split == "test" else row % 2 for row in range(len(sentences))]
    return pa.table({"sentence": sentences, "label": labels, "idx": list(range(len(sentences)))})


def write_hub_dataset(directory: Path, name: str, splits: dict[str, pa.Table]) -> Path:
    files = "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
    tables = {f"{name}/{split}": table for split, table in splits.items()}
    return write_dataset(directory, tables, f"configs:\n- config_name: {name}\n  data_files:\n{files}")


def train(hub, tmp_path, config):
    environment = {**hub.environment(tmp_path / "hub"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, ROOT / "train.py", "--config", ROOT / "configs" / f"{config}.yaml", *SHORT]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "runs" / config / "results.json").read_text()), done.stdout


@pytest.mark.slow
def test_the_reference_run_from_the_hub(hub, tmp_path):
    results, output = train(hub, tmp_path, "wikitext2-sparse-lora")
    assert "from the hub's distilbert/distilbert-base-uncased" in output
    assert results["base"] == "distilbert/distilbert-base-uncased"
    assert results["sparsity"] == 0.5
    assert results["adapter_entries_kept"] * 2 == results["adapter_entries"] == 2 * 2 * 2 * 8 * 32
    assert not any("embeddings" in name for name in hub.downloads if name.endswith("safetensors"))
    card = (tmp_path / "runs/wikitext2-sparse-lora/adapter/README.md").read_text()
    assert "base_model: distilbert/distilbert-base-uncased" in card
    assert "Salesforce/wikitext" in card


@pytest.mark.slow
def test_qlora_on_sst2_from_the_hub(hub, tmp_path):
    results, output = train(hub, tmp_path, "sst2-qlora-bert-base")
    assert results["test_split"] == "validation"
    assert "initialised at random and trained" in output  # the checkpoint has a masked-LM head, and no classifier
    assert set(results["test"]) == {"loss", "accuracy", "f1", "matthews"}
    assert results["label_names"] is None or len(results["label_names"]) == 2
