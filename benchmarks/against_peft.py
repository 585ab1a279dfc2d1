"""SST-2 on both sides: jaxpeft's and torch PEFT's LoRA, HiRA and DoRA, three seeds each.

    python -m benchmarks.against_peft --data ../shared/data

MiniLM, the 6,920 whole training sentences, 3 epochs of batches of 16, rank 8 on query and value, dev accuracy after the last
step. For each seed both sides have the same initialisation of the adapter and the new head, the same batches in the same order, the
same schedule, clipping and AdamW. Only the dropout of the base differs. Each run is written to `benchmarks/against_peft.json` when it
is done, and is not run again if it is there. Exit status 1 if a mean is more than 0.7 points from torch PEFT's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import sst2
from jaxpeft import RunConfig, train
from jaxpeft.config import AdapterConfig
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.runs.adapters import build_method, prepare_adapters
from jaxpeft.runs.base_model import load_base
from jaxpeft.runs.data import load_data, text_pipeline
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.schedule import make_plan
from jaxpeft.trees import by_leaf

BOUND = 0.007
"""How far a mean over the seeds may be from torch PEFT's: 0.7 points of accuracy."""

METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"method": "lora", "alpha": 8.0}, 1e-3),
    "hira": ({"method": "hira"}, 3e-3),
    "dora": ({"method": "lora", "alpha": 8.0, "use_dora": True}, 1e-3),
}
"""Adapter options and learning rate of each method (METHODS: methods are never compared at one rate)."""


def config_of(method: str, seed: int, data: Path, output: str) -> RunConfig:
    """The run that both sides do."""
    base = sst2(data, output).config
    options, learning_rate = METHODS[method]
    adapter = AdapterConfig(rank=8, target_modules=["query", "value"], **options)
    training = replace(base.training, learning_rate=learning_rate, eval_every_steps=433)  # once an epoch
    return replace(base, name=f"{method}-{seed}", seed=seed, adapter=adapter, training=training)


def train_jaxpeft(config: RunConfig) -> float:
    """Dev accuracy after the last step, by jaxpeft."""
    train(config)
    log = read_metrics(RunDirectory.of(config).metrics)
    return [row for row in log if row["split"] == "validation"][-1]["accuracy"]


def train_peft(config: RunConfig) -> float:
    """Dev accuracy after the last step, by torch PEFT with the same initialisation and batches."""
    import torch
    from peft import HiraConfig, LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    task, splits = load_data(config.data, config.task)
    # The start of DoRA is LoRA's and the norms of the base, which PEFT takes itself.
    plain = AdapterConfig(rank=8, method=config.adapter.method)
    method = build_method(plain)
    model, tokenizer = load_base(config.model, task, method, plain, max_length=config.data.max_length, seed=config.seed)
    start = prepare_adapters(plain, method, task, model, seed=config.seed).adapters
    batch_size = config.training.batch_size
    pipeline = text_pipeline(config.data, model, tokenizer)
    data = task.make_data(splits.train, pipeline, batch_size=batch_size, seed=config.seed)
    batch_size = config.evaluation.batch_size
    dev = task.make_data(splits.validation, pipeline, batch_size=batch_size, seed=config.seed)
    plan = make_plan(
        config.training, config.pruning, batches_per_epoch=data.batches_per_epoch, metric="accuracy", method=method
    )

    torch.manual_seed(config.seed)
    common = {"r": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    if config.adapter.method == "hira":
        peft_config: Any = HiraConfig(**common)
    else:
        peft_config = LoraConfig(lora_alpha=8, use_dora=getattr(config.adapter, "use_dora", False), **common)
    base = AutoModelForSequenceClassification.from_pretrained(model.source.directory, num_labels=2)
    peft: PeftModel = get_peft_model(base, peft_config)
    _copy_start(peft, start)
    decayed, spared = [], []
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            (spared if name.endswith("bias") else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.training.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    peft.train()
    for step in range(plan.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = float(plan.learning_rate(step))
        batch = data.train_batch(step)
        rows = torch.tensor(batch["weights"]) > 0
        logits = peft(**_inputs(batch)).logits[rows]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(batch["labels"], dtype=torch.long)[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed + spared, config.training.max_grad_norm)
        optimizer.step()
        if step % 100 == 0:
            print(f"  torch {config.name}: step {step} of {plan.num_steps}, loss {loss.item():.3f}", flush=True)
    peft.eval()
    right = total = 0
    with torch.no_grad():
        for batch in dev.eval_batches():
            rows = batch["weights"] > 0
            predicted = peft(**_inputs(batch)).logits.argmax(-1).numpy()
            right += int((predicted == batch["labels"])[rows].sum())
            total += int(rows.sum())
    return right / total


def _copy_start(peft: Any, start: Any) -> None:
    """Copy jaxpeft's initial A and head into `peft`. B is zero on both sides."""
    import torch

    parameters = dict(peft.named_parameters())
    wanted = {}
    for path, site in start["sites"].items():
        name = f"base_model.model.{path.replace('/', '.')}"
        key = next(key for key in parameters if key.startswith(name) and ("lora_A" in key or "hira_A" in key))
        wanted[key] = np.asarray(site["a"]).T
    for path, leaf in by_leaf(start["modules"]).items():
        layer, _, leaf_name = path.rpartition("/")
        key = f"base_model.model.{layer.replace('/', '.')}.modules_to_save.default."
        wanted[key + {"kernel": "weight"}.get(leaf_name, leaf_name)] = np.asarray(leaf).T
    with torch.no_grad():
        for key, value in wanted.items():
            parameters[key].copy_(torch.tensor(np.ascontiguousarray(value)))


def _inputs(batch: Any) -> dict[str, Any]:
    import torch

    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: torch.tensor(batch[name], dtype=torch.long) for name in names}


def summary(record: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means and spreads by method, in points of accuracy, and their difference."""
    table = {}
    for method in METHODS:
        sides = {
            side: [run["accuracy"] for key, run in record.items() if key.startswith(f"{side}-{method}-")]
            for side in ("ours", "theirs")
        }
        if all(len(values) > 1 for values in sides.values()):
            mean = {side: statistics.mean(values) for side, values in sides.items()}
            spread = {f"{side}_spread": statistics.stdev(values) for side, values in sides.items()}
            table[method] = {**mean, **spread, "difference": mean["ours"] - mean["theirs"]}
    return table


def main() -> None:
    """Run and record the runs that are not recorded yet; fail if a mean is too far from torch PEFT's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="directory of sst2/")
    parser.add_argument("--sides", nargs="+", choices=("ours", "theirs"), default=["ours", "theirs"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/against_peft.json"))
    args = parser.parse_args()
    for seed in args.seeds:
        for method in args.methods:
            for side in args.sides:
                _measure(side, method, seed, args)
    record = json.loads(args.output.read_text())["runs"]
    missed = [method for method, row in summary(record).items() if abs(row["difference"]) > BOUND]
    print(json.dumps(summary(record), indent=2))
    sys.exit(f"more than {100 * BOUND} points apart: {', '.join(missed)}" if missed else 0)


def _measure(side: str, method: str, seed: int, args: argparse.Namespace) -> None:
    record = json.loads(args.output.read_text())["runs"] if args.output.is_file() else {}
    key = f"{side}-{method}-{seed}"
    if key in record:
        return
    with tempfile.TemporaryDirectory() as runs:
        started = time.monotonic()
        accuracy = {"ours": train_jaxpeft, "theirs": train_peft}[side](config_of(method, seed, args.data, runs))
    record = json.loads(args.output.read_text())["runs"] if args.output.is_file() else {}
    record[key] = {"accuracy": accuracy, "seconds": round(time.monotonic() - started)}
    print(key, record[key], flush=True)
    args.output.write_text(json.dumps({"runs": record, "summary": summary(record)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
