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
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import CASES, COMPARED, VARIANTS, Case, peft_variants
from benchmarks.speed.machine import describe, measured_now
from benchmarks.speed.record import best_rate, check, row, summary
from benchmarks.speed.rounds import Paths, Runner, compare, measure_peaks, workers, write_workload
from benchmarks.speed.startup import measure as measure_startup
from benchmarks.speed.table import RESULTS, full_table


def measure(case: Case, method: str, record: dict[str, Any], args: argparse.Namespace, workload: Path) -> None:
    """Compare a method on a case, and put it into the record. Another method than LoRA has jaxpeft's LoRA timed beside it."""
    offered = peft_variants(case, method, record["device"])
    variants = [name for name, missing in offered.items() if name in args.variants and not missing]
    runners = [Runner(method), *(Runner(method, variant) for variant in variants)]
    beside = [] if method == "lora" else [Runner("lora")]
    timings = compare(case, beside + runners, rounds=args.rounds, workload=workload, paths=paths_of(args))
    config = json.loads((workload / "model" / "config.json").read_text())
    measured = {**measured_now(), "rounds": args.rounds, "peak": best_rate(record["peaks"][case.dtype])}
    found = row(case, method, timings, config, offered=offered, measured=measured)
    record["cases"].setdefault(case.name, {})[method] = found
    print(summary(case.name, method, found), flush=True)


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
