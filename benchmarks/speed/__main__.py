"""jaxpeft beside torch PEFT on the same work: python -m benchmarks.speed --data ../shared/data/sst2/train-sentences.tsv

Both sides have the same architecture, weights, batch, length, dropout, precision, optimizer and number of masked tokens. Each side is a
process of its own, and they work in turn, so that other work on the machine slows both alike. The record goes to `--output`, as
`cpu.json` (or the accelerator's name) and as a Markdown table. Figures of an earlier run on the same machine stay until they are measured
again; each says when, and at which commit, it was measured. Exit status 1 if a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import CASES, COMPARED, VARIANTS, Case, peft_variants
from benchmarks.speed.machine import describe, measured_now
from benchmarks.speed.record import cell, check, ratio
from benchmarks.speed.rounds import Paths, Runner, compare, workers, write_workload
from benchmarks.speed.startup import measure as measure_startup
from benchmarks.speed.table import RESULTS, full_table

PRODUCTS = {
    "cpu": [(2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)],
    "gpu": [(32768, 768, 3072), (32768, 3072, 768), (8192, 8192, 8192)],
}
"""Sizes of matrix products whose best rate counts as the peak: BERT-base's own, and a large square one."""


def measure(case: Case, method: str, record: dict[str, Any], args: argparse.Namespace, workload: Path) -> None:
    """Compare a method on a case, and put it into the record. Another method than LoRA has jaxpeft's LoRA timed beside it."""
    offered = peft_variants(case, method, record["device"])
    variants = [name for name, missing in offered.items() if name in args.variants and not missing]
    ours, lora = Runner(method), Runner("lora")
    runners = [ours, *(Runner(method, variant) for variant in variants)]
    beside = [] if method == "lora" else [lora]
    timings = compare(case, beside + runners, rounds=args.rounds, workload=workload, paths=paths_of(args))
    config = json.loads((workload / "model" / "config.json").read_text())
    peak = max(rate["rate"] for side in record["peaks"][case.dtype].values() for rate in side)
    row: dict[str, Any] = {runner.column: cell(case, method, timings[runner], config, peak=peak) for runner in runners}
    row["ratios"] = {runner.column: ratio(timings[ours], timings[runner]) for runner in runners if runner.variant}
    row["empty"] = {name: missing for name, missing in offered.items() if missing}
    row["measured"] = {**measured_now(), "rounds": args.rounds, "peak": peak}
    if beside:
        row["step_over_lora"] = ratio(timings[lora], timings[ours])
    record["cases"].setdefault(case.name, {})[method] = row
    print(_summary(case, method, row), flush=True)


def _summary(case: Case, method: str, row: Mapping[str, Any]) -> str:
    ratios = ", ".join(
        f"{name} {r['median']:.2f}× ({r['min']:.2f} to {r['max']:.2f})" for name, r in row["ratios"].items()
    )
    over = f", {row['step_over_lora']['median']:.2f} of LoRA's step" if "step_over_lora" in row else ""
    return f"{case.name} {method}: {row['ours']['seconds']:.4g} s a step{over}; faster than PEFT: {ratios or '–'}"


def measure_peaks(dtypes: set[str], device: str, paths: Paths, *, rounds: int = 3) -> dict[str, Any]:
    """Both sides' rates of matrix products by dtype, the best of `rounds` in turns."""
    repeats = 1 if device == "cpu" else 20
    peaks: dict[str, Any] = {}
    with workers(["ours", "theirs"], paths) as sides:
        for dtype in sorted(dtypes):
            peaks[dtype] = {worker.side: [] for worker in sides}
            for size in PRODUCTS[device]:
                rates: dict[str, list[float]] = {worker.side: [] for worker in sides}
                for _ in range(rounds + 1):  # the first round warms up
                    for worker in sides:
                        answer = worker.ask("rate", size=size, dtype=dtype, repeats=repeats)
                        rates[worker.side].append(answer["flops_per_second"])
                for side, values in rates.items():
                    peaks[dtype][side].append({"size": list(size), "rate": float(f"{max(values[1:]):.4g}")})
    return peaks


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """The record before anything is measured: the machine, and the figures of an earlier run on it."""
    with workers(["ours", "theirs"], paths_of(args)) as (ours, theirs):
        about = {worker.side: worker.ask("about") for worker in (ours, theirs)}
    devices = {side["device"] for side in about.values()}
    if len(devices) > 1:
        sys.exit(f"the two sides found different devices: {about}")
    name = "cpu" if devices == {"cpu"} else about["ours"]["device_name"].lower().replace(" ", "-")
    record = {
        "device": devices.pop(),
        "device_name": name,
        "machine": describe(),
        "versions": {side: answer["versions"] for side, answer in about.items()},
        "peaks": {},
        "cases": {},
    }
    file = args.output / f"{name}.json"
    if file.is_file():
        earlier = json.loads(file.read_text())
        if (earlier["machine"], earlier["versions"]) != (record["machine"], record["versions"]):
            sys.exit(f"{file} is of another machine or other versions: remove it, or give another --output")
        record |= {key: earlier[key] for key in ("peaks", "cases", "startup") if key in earlier}
    return record


def paths_of(args: argparse.Namespace) -> Paths:
    """Where each side's packages are."""
    return Paths(args.jaxpeft_pythonpath, args.peft_pythonpath)


def write(record: dict[str, Any], output: Path) -> None:
    """Write the record as JSON and as Markdown, with its bounds checked."""
    record["bounds"] = check(record)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{record['device_name']}.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / f"{record['device_name']}.md").write_text(full_table(record))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, help="default: those of the device that is found")
    parser.add_argument("--methods", nargs="+", choices=COMPARED, help="default: those of each case")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="ways PEFT is used")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each side")
    parser.add_argument(
        "--steps", "--updates", dest="steps", type=int, help="steps in a round (default: the case's own number)"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2/train-sentences.tsv"),
                        help="SST-2's whole sentences, sentence<TAB>label, for sst2-lengths")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument(
        "--jaxpeft_pythonpath", "--ours_pythonpath", help="directory put first on jaxpeft's import path"
    )
    parser.add_argument("--peft_pythonpath", help="directory put first on torch PEFT's import path")
    parser.add_argument("--startup", action=argparse.BooleanOptionalAction, default=None,
                        help="time `python train.py` up to its first step; default: on a CPU")  # fmt: skip
    return parser.parse_args(argv)


def main() -> None:
    """Measure, write as it goes, and exit with status 1 if a bound is missed."""
    args = parse()
    record = begin(args)
    names = (
        [name for name, case in CASES.items() if case.device == record["device"]] if args.cases is None else args.cases
    )
    cases = [CASES[name] for name in names]
    if any(case.task == "classification" for case in cases) and not args.data.is_file():
        sys.exit(f"--data {args.data} is not a file; give SST-2's whole sentences, or --cases without sst2-lengths")
    if cases:
        record["peaks"] |= measure_peaks({case.dtype for case in cases}, record["device"], paths_of(args))
    for case in cases:
        if args.steps and case.steps_per_round:
            case = replace(case, steps_per_round=args.steps)
        with tempfile.TemporaryDirectory() as directory:
            write_workload(case, args.data.absolute(), Path(directory), paths_of(args))
            for method in args.methods or case.methods:
                measure(case, method, record, args, Path(directory))
                write(record, args.output)
    if args.startup or (args.startup is None and record["device"] == "cpu"):
        with tempfile.TemporaryDirectory() as directory:
            record["startup"] = {**measure_startup(Path(directory)), "measured": measured_now()}
    write(record, args.output)
    for bound in record["bounds"]:
        sign = ">=" if bound["least"] else "<="
        print(f"{bound['what']}: {bound['value']:.4g} {sign} {bound['limit']:g}: {'met' if bound['met'] else 'MISSED'}")
    sys.exit(0 if all(bound["met"] for bound in record["bounds"]) else 1)


if __name__ == "__main__":
    main()
