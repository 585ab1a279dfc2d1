"""The quickstart's promises, checked: python -m benchmarks.quickstart

Runs `python train.py` as a user would, then the head-only baseline with the same steps, and fails if the quickstart took longer
than 3 minutes, predicted fewer than 27 % of the masked tokens, or was not 1.5 times better in perplexity than head-only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

MAX_SECONDS = 180
MIN_ACCURACY = 0.27
MIN_GAIN = 1.5

ROOT = Path(__file__).parent.parent


def train(output_dir: Path, *flags: str) -> tuple[dict, float]:
    """Run train.py with `flags`; return its results and its wall time in seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, ROOT / "train.py", "--output_dir", output_dir, *flags], check=True)
    seconds = time.monotonic() - started
    (results,) = (json.loads(path.read_text()) for path in output_dir.glob("*/results.json"))
    return results, seconds


def main() -> None:
    """Run both, print the figures, and exit with status 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new directory for both runs")
    output = parser.parse_args().output_dir
    quickstart, seconds = train(output / "quickstart")
    head, _ = train(output / "head", "--adapter.method", "head", "--pruning.sparsity", "0")
    gain = head["test"]["perplexity"] / quickstart["test"]["perplexity"]
    checks = {
        f"{seconds:.0f} s, at most {MAX_SECONDS}": seconds <= MAX_SECONDS,
        f"accuracy {quickstart['test']['accuracy']:.3f}, at least {MIN_ACCURACY}": quickstart["test"]["accuracy"]
        >= MIN_ACCURACY,
        f"perplexity {quickstart['test']['perplexity']:.1f}, head-only {head['test']['perplexity']:.1f}: "
        f"{gain:.2f} times lower, at least {MIN_GAIN}": gain >= MIN_GAIN,
    }
    for text, met in checks.items():
        print(f"quickstart: {text}: {'met' if met else 'MISSED'}")
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
