"""The README's table of methods: python -m benchmarks.methods

Runs the quickstart once with every method, one after the other, and writes `benchmarks/methods.json` and the table to paste. Each method
has its own learning rate, the best by validation perplexity of those given: methods are never compared at one rate.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

DENSE = ["--pruning.sparsity", "0"]
METHODS: dict[str, list[str]] = {
    "head only": ["--adapter.method", "head", *DENSE],
    "LoRA": DENSE,
    "Sparse LoRA 50 %": [],
    "QLoRA": ["--model.quantization", "nf4", *DENSE],
    "HiRA": ["--adapter.method", "hira", *DENSE],
    "full": ["--adapter.method", "full", *DENSE],
}


def measure(name: str, flags: list[str], learning_rate: float, runs: Path) -> dict:
    """Run the quickstart with `flags`; return its results with the validation perplexity that chooses the rate."""
    label = f"{name}-{learning_rate:g}".replace(" ", "-").replace("%", "")
    command = [sys.executable, ROOT / "train.py", "--output_dir", runs, "--name", label, *flags]
    subprocess.run([*command, "--training.learning_rate", str(learning_rate)], check=True, stdout=subprocess.DEVNULL)
    run = runs / label
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    validation = [row for row in rows if row["split"] == "validation" and row["step"] == results["best_step"]]
    return {**results, "learning_rate": learning_rate, "validation_perplexity": validation[-1]["perplexity"]}


def table(record: dict[str, list[dict]]) -> str:
    """The Markdown table: every method at its best learning rate."""
    best = {name: min(rows, key=lambda row: row["validation_perplexity"]) for name, rows in record.items()}
    lines = [
        "| method | test perplexity | masked-token accuracy | trainable | export | frozen base in memory | tokens/s | learning rate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in best.items():
        kept = f" ({row['adapter_entries_kept']:,} adapter entries kept)" if row["sparsity"] else ""
        lines.append(
            f"| {name} | {row['test']['perplexity']:.1f} | {row['test']['accuracy']:.3f} | {row['parameters_trainable']:,}{kept} "
            f"| {row['export_bytes'] / 1e6:.2f} MB | {row['frozen_bytes'] / 1e6:.1f} MB "
            f"| {row['tokens_per_second']:,.0f} | {row['learning_rate']:g} |"
        )
    return "\n".join(lines)


LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "head only": (3e-3,),
    "LoRA": (3e-3,),
    "Sparse LoRA 50 %": (3e-3,),
    "QLoRA": (3e-3,),
    "HiRA": (1e-2,),
    "full": (5e-4,),
}


def main() -> None:
    """Run every method at every rate, recording as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/methods.json"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    record: dict[str, list[dict]] = json.loads(args.output.read_text()) if args.output.is_file() else {}
    with tempfile.TemporaryDirectory() as runs:
        for name in args.methods:
            record[name] = [measure(name, METHODS[name], rate, Path(runs)) for rate in LEARNING_RATES[name]]
            args.output.write_text(json.dumps(record, indent=2) + "\n")
            print(table(record), flush=True)


if __name__ == "__main__":
    main()
