"""The workload of a case, for both sides: one model, and batches in numpy's format. Runs once per case, in a process of its own.

    python -m benchmarks.speed.workload CASE_AS_JSON DATA DIRECTORY

writes `model/` (transformers' format, with a tokenizer) and `check.npz` (the batch on which the first losses of both sides must agree);
for masked-lm `batches.npz` (the first batches of jaxpeft's run); for classification `slice.tsv` (the texts) and `rows.npz` (token ids).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.cases import TOKENIZER, Case
from benchmarks.speed.configuration import run_config

NUM_BATCHES = 16
"""Number of distinct batches that torch PEFT cycles through. They lie ready in memory, so its data costs nothing."""


def write_workload(case: Case, data: Path, directory: Path) -> None:
    """Write all of it; `data` is SST-2's file of whole sentences, for a classification."""
    from jaxpeft.runs.data import load_data, row_options
    from jaxpeft.tasks.text_pipeline import TextPipeline

    if case.task == "classification":
        _write_slice(case, data, directory)
    tokenizer = _write_model(case, directory)
    config = run_config(case, "lora", directory)
    task, splits = load_data(config.data, config.task)
    pipeline = TextPipeline(tokenizer, row_options(config.data), case.length)
    train = task.make_data(splits.train, pipeline, batch_size=case.rows, seed=config.seed)
    if case.task == "masked-lm":
        batches = [train.train_batch(i) for i in range(NUM_BATCHES)]
        _save(directory / "batches.npz", {name: np.stack([batch[name] for batch in batches]) for name in batches[0]})
        check = batches[0]
    else:
        encoded, rows = train.encoded, min(case.rows, len(train.labels))
        _save(
            directory / "rows.npz",
            {"input_ids": encoded.input_ids, "offsets": encoded.offsets, "labels": train.labels},
        )
        check = _padded(encoded.input_ids, encoded.offsets, np.arange(rows))
        check |= {"labels": train.labels[:rows], "weights": np.ones(rows, np.float32)}
    _save(directory / "check.npz", check)


def _padded(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
    """`rows` of a flat array as a batch as long as its longest row."""
    lengths = (offsets[1:] - offsets[:-1])[rows]
    inside = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.where(inside, offsets[rows][:, None] + np.arange(lengths.max()), 0)
    return {
        "input_ids": np.where(inside, ids[tokens], 0).astype(np.int32),
        "attention_mask": inside.astype(np.int32),
        "token_type_ids": np.zeros(inside.shape, np.int32),
    }


def _save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez(path, **arrays)


def _write_slice(case: Case, data: Path, directory: Path) -> None:
    lines = data.read_text().splitlines()
    chosen = np.random.default_rng(0).permutation(len(lines))[: case.data_rows]
    (directory / "slice.tsv").write_text("".join(f"{lines[i]}\n" for i in chosen))


def _write_model(case: Case, directory: Path) -> Any:
    """Save the case's whole model, with weights that its checkpoint lacks drawn at random; return its tokenizer."""
    from jaxpeft.interop.transformers_files import save_model
    from jaxpeft.models.build import load_model
    from jaxpeft.models.sources import resolve
    from jaxpeft.models.tokenizers import load_tokenizer

    name, weights = str(case.model), "pretrained"
    if not isinstance(case.model, str):
        (directory / "config.json").write_text(json.dumps(case.model))
        name, weights = str(directory / "config.json"), "random"
    tokenizer = load_tokenizer(resolve(TOKENIZER).directory)
    num_labels = 2 if case.task == "classification" else None
    model = load_model(name, case.task, weights=weights, num_labels=num_labels)
    save_model(directory / "model", model, model.params, tokenizer=tokenizer)
    return tokenizer


if __name__ == "__main__":
    write_workload(Case(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
