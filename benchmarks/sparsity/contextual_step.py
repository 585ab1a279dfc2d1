"""The cost of a training step with contextual sparsity, relative to LoRA's: python -m benchmarks.sparsity.contextual_step

BERT-base with random weights, LoRA of rank 8 on query and value, dropout 0.1, fp32. All cases take turns in one process, one step at a
time, and each time is divided by that of LoRA in the same round. Also XLA's count of the operations of the compiled step, its temporary
memory, and the time of the choice itself: a program that only chooses the channels of "upper half", which takes its turn as the steps do.
Writes `benchmarks/sparsity/contextual_step.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.machine import describe, measured_now
from jaxpeft.adapters import Lora
from jaxpeft.adapters.build import init_adapters
from jaxpeft.contextual import ContextualSparsity
from jaxpeft.contextual.choice import estimated_squares, highest, sampled
from jaxpeft.contextual.estimators import activation_of, dense_weights, make_estimators, projection_paths
from jaxpeft.models.build import Model, load_model
from jaxpeft.pruning.structures import num_kept
from jaxpeft.targets import match_targets
from jaxpeft.tasks import task_for
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer, learning_rate_schedule
from jaxpeft.training.step import init_state, make_train_step
from jaxpeft.trees import ESTIMATORS, Layers, leaf_paths

BERT_BASE = {
    **{"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12},
    **{"num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 2},
}
HIDDEN, LAYERS, MASKED = 768, 12, 19
UPPER = ContextualSparsity((0.0,) * 6 + (0.9,) * 6, (0.0,) * 6 + (0.5,) * 6)
ALL_BUT_TWO = ContextualSparsity((0.0,) * 2 + (0.95,) * 10, (0.0,) * 2 + (0.75,) * 10)
SETTINGS = {
    "lora": None,
    "upper half": UPPER,
    "upper half, every token sparse": replace(UPPER, dense_tokens=False),
    "upper half, chosen at random": replace(UPPER, selection="random"),
    "all but two": ALL_BUT_TWO,
    "all but two, every token sparse": replace(ALL_BUT_TWO, dense_tokens=False),
}
"""Case → what its steps leave out. Upper half: feed-forward 0.9, attention 0.5; all but the first two layers: 0.95 and 0.75."""


CHOICE = "the choice alone"


def batch_of(task: str, rows: int, length: int) -> dict[str, jax.Array]:
    """A batch of random tokens, without padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 20000, (rows, length))
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if task == "masked-lm":
        places = np.sort(np.stack([rng.permutation(length)[:MASKED] for _ in range(rows)]))
        batch |= {"positions": places, "labels": rng.integers(1000, 20000, (rows, MASKED))}
    else:
        batch |= {"labels": rng.integers(0, 2, rows)}
    weights = jnp.ones(batch["labels"].shape, jnp.float32)
    return {**{name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}, "weights": weights}


def choose_channels(model: Model, settings: ContextualSparsity, estimators: Layers, x: jax.Array) -> list[jax.Array]:
    """The channels that a step with `settings` chooses, if the input of every layer is `x: [rows, length, d]`."""
    leaves, activation = leaf_paths(model.params), activation_of(model)
    tokens, weights = sampled(x, jnp.ones(x.shape[:2]))
    chosen = []
    for number, (attention, feed_forward) in enumerate(zip(settings.attention, settings.feed_forward, strict=True)):
        paths = projection_paths(model, number)

        def squares(name: str, f: Any = None, paths: Mapping[str, str] = paths) -> jax.Array:
            return estimated_squares(tokens, weights, estimators[paths[name]], *dense_weights(leaves, paths[name]), f)

        if attention:
            for scores in (squares("query") * squares("key"), squares("value")):
                chosen.append(highest(scores, num_kept(scores.size, attention)))
        if feed_forward:
            scores = squares("intermediate", activation)
            chosen.append(highest(scores, num_kept(scores.size, feed_forward)))
    return chosen


@dataclass
class Step:
    """A compiled step on one batch, and the state that it changes."""

    program: Any
    state: Any
    frozen: Any
    batch: Any

    def run(self) -> float:
        """Take one step; return its seconds."""
        start = time.perf_counter()
        self.state, metrics = self.program(self.state, self.frozen, self.batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def compiled_steps(task_name: str, rows: int, length: int, cases: list[str]) -> dict[str, Step]:
    """The compiled step of every case."""
    task = task_for(task_name, None if task_name == "masked-lm" else 2)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "config.json"
        file.write_text(json.dumps(BERT_BASE))
        model = load_model(str(file), task.head, weights="random", num_labels=task.num_labels)
    method = Lora(rank=8, alpha=16.0, dropout=0.1)
    targets = match_targets(model.sites(), ["query", "value"])
    frozen, adapters = init_adapters(model.params, method, targets, rng=jax.random.key(0))
    estimators = make_estimators(model, range(LAYERS))
    optimizer = build_optimizer(learning_rate_schedule(1e-3, 1000, 0, "linear"), weight_decay=0.01, max_grad_norm=1.0)
    batch, steps = batch_of(task_name, rows, length), {}
    for name in cases:
        settings = SETTINGS[name]
        step: Any = make_train_step(Objective(model, method, task, None, settings), optimizer)
        state = init_state(adapters, optimizer, dropout_key(0), pruned=False)
        beside = {**frozen, ESTIMATORS: estimators} if settings else frozen
        steps[name] = Step(step.lower(state, beside, batch).compile(), state, beside, batch)
    x = jax.random.normal(jax.random.key(1), (rows, length, HIDDEN))

    @jax.jit
    def choose(state: None, frozen: Any, batch: jax.Array) -> tuple[None, list[jax.Array]]:
        del state
        with_weights = replace(model, params=frozen["params"])
        return None, choose_channels(with_weights, UPPER, frozen[ESTIMATORS], batch)

    beside = {"params": model.params, ESTIMATORS: estimators}
    steps[CHOICE] = Step(choose.lower(None, beside, x).compile(), None, beside, x)
    return steps


def main() -> None:
    """Compile every case, let them take turns, and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("masked-lm", "classification"), default="masked-lm")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cases", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="with lora, the first"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/sparsity/contextual_step.json"))
    args = parser.parse_args()
    if args.cases[0] != "lora":
        parser.error("the others are measured against lora; name it first")
    steps = compiled_steps(args.task, args.rows, args.length, args.cases)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.rounds + 1):
        for name, step in steps.items():
            taken = step.run()
            if turn:  # the first round warms up
                seconds[name].append(taken)
    flops = {name: step.program.cost_analysis()["flops"] for name, step in steps.items()}
    ratios = {name: [a / b for a, b in zip(times, seconds["lora"], strict=True)] for name, times in seconds.items()}
    record = {
        "work": f"BERT-base, {args.task}, {args.rows} × {args.length}, LoRA of rank 8 on query and value, fp32",
        "machine": describe(),
        **measured_now(),
        "lora_seconds": statistics.median(seconds["lora"]),
        "cases": {
            name: {
                "operations": round(flops[name] / flops["lora"], 4),
                "time": round(statistics.median(ratios[name]), 4),
                "spread": [round(min(ratios[name]), 4), round(max(ratios[name]), 4)],
                "temporary_bytes": steps[name].program.memory_analysis().temp_size_in_bytes,
            }
            for name in steps
        },
    }
    records = json.loads(args.output.read_text()) if args.output.exists() else {}
    records[f"{args.task}, {args.rows} x {args.length}"] = record
    args.output.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(record, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
