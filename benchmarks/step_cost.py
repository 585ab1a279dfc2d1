"""The README's relative step times: python -m benchmarks.step_cost

One training step of every method on the same work, the case `minilm-quickstart` of `benchmarks.speed` (16 rows of 128 tokens of masked-LM,
adapters of rank 8 on query and value): the loops of all methods take turns in one process, and each time is divided by LoRA's
of the same round. Writes `benchmarks/step_cost.json`: median ratio, and the spread of the rounds. `python -m benchmarks.speed` times some
of the methods beside torch PEFT, each in a process of its own; this is the table of all of them.

S²FT trains as many parameters as LoRA, in 32 channels of every second feed-forward layer; "s2ft-upper" in 64 channels of those in the
upper half. "contextual" leaves out 0.9 of the feed-forward channels and 0.5 of the others in the upper half. On BERT-base:

    python -m benchmarks.step_cost --case bert-base-mlm --methods lora s2ft s2ft-upper --output benchmarks/step_cost_bert_base.json

`--flops` compiles every step once more and records XLA's count of its operations, which does not depend on the machine's load.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import jax

from benchmarks.speed.cases import CASES, METHODS, RANK, Case
from benchmarks.speed.jaxpeft_side import Trainer
from benchmarks.speed.workload import write_workload

STEPS_PER_ROUND = 2
WARM_ROUNDS = 3


def trainers(case: Case, methods: list[str]) -> dict[str, Trainer]:
    """Every method's loop on `case`, compiled and warm."""
    with tempfile.TemporaryDirectory() as directory:
        workload = Path(directory)
        write_workload(case, Path(), workload)
        ready = {method: Trainer(case, method, workload) for method in methods}
    for trainer in ready.values():
        for _ in range(WARM_ROUNDS):
            trainer.run_round()
    return ready


def main() -> None:
    """Let the methods take turns, and record the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="with lora")
    cases = [name for name, case in CASES.items() if case.task == "masked-lm" and case.device == "cpu"]
    parser.add_argument("--case", choices=cases, default="minilm-quickstart")
    parser.add_argument("--flops", action="store_true", help="also count the operations of a step")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/step_cost.json"))
    args = parser.parse_args()
    if "lora" not in args.methods:
        parser.error("the others are measured against lora; name it too")
    case = replace(CASES[args.case], steps_per_round=STEPS_PER_ROUND)
    ready = trainers(case, args.methods)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(args.rounds):
        for name, trainer in ready.items():
            seconds[name].append(trainer.run_round()[0] / trainer.steps_per_round)
    ratios = {name: [t / lora for t, lora in zip(seconds[name], seconds["lora"], strict=True)] for name in ready}
    record = {
        "work": f"{case.title}, rank {RANK} on query and value, fp32",
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}, {len(jax.devices())} device",
        "jax": jax.__version__,
        "lora_seconds": statistics.median(seconds["lora"]),
        "relative": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()},
        "trained": {name: trainer.trainable for name, trainer in ready.items()},
    }
    if args.flops:
        flops = {name: trainer.counted_flops() for name, trainer in ready.items()}
        record["relative_flops"] = {name: round(count / flops["lora"], 4) for name, count in flops.items()}
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
