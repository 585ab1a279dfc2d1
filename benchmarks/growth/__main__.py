"""How cost grows: python -m benchmarks.growth --data ../shared/data

Steps: time and peak memory over the rows of a batch, the length of rows, the layers of the encoder, the rank, and the number of adapted
layers. The encoder has MiniLM's size. Starts: time to the first step and resident memory over the size of a training text (masked-LM, 5
to 500 MB) and over the number of rows (classification, 10,000 to 1,000,000); both for the first start, which tokenises, and for the
second one, which reads the token cache. Each point is a process of its own.

The record is written after each point to `--output`: `cpu.json` (or the accelerator's name), a Markdown table and a picture for each
question. The same command continues a record: it measures only points that are missing. It ends with status 1 if the bound is missed:
500 MB of text train in at most 1.5 GB more than 5 MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.growth.pictures import draw
from benchmarks.growth.questions import Point, Question, Start, Work, questions
from benchmarks.growth.starts import VALIDATION, measure_starts
from benchmarks.growth.steps import measure_steps
from benchmarks.growth.table import BOUND_BYTES, bound, report
from benchmarks.growth.texts import SOURCES
from benchmarks.speed.machine import describe
from benchmarks.speed.rounds import ROOT, Paths, workers

RESULTS = ROOT / "benchmarks" / "growth"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(questions())
    parser.add_argument("--questions", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with wikitext-2/ and sst2/")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of a step")
    parser.add_argument("--again", action="store_true", help="also measure points that the record has")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny sizes, to try the command; give an --output of its own"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the record")
    args = parser.parse_args(argv)
    if args.tiny and args.output.resolve() == RESULTS:
        parser.error("--tiny needs another --output than the folder of the real record")
    return args


def begin(output: Path, *, tiny: bool) -> dict[str, Any]:
    """The record before anything is measured: the machine, and the points of an earlier run on it."""
    with workers(["ours"], Paths()) as (worker,):
        about = worker.ask("about")
    name = "cpu" if about["device"] == "cpu" else about["device_name"].lower().replace(" ", "-")
    record = {"device": name, "tiny": tiny, "machine": describe(), "versions": about["versions"], "points": {}}
    file = output / f"{name}.json"
    if file.is_file():
        earlier = json.loads(file.read_text())
        if any(earlier[key] != record[key] for key in ("tiny", "machine", "versions")):
            sys.exit(
                f"{file} is of another machine, other versions or other sizes: remove it, or give another --output"
            )
        record["points"] = earlier["points"]
    return record


def missing(record: Mapping[str, Any], asked: Mapping[str, Question], *, again: bool) -> list[Point]:
    """The points of the questions that are `asked`, each once. Without those of the record, unless they are measured `again`."""
    points = {point.key: point for question in asked.values() for point in question.points}
    return [point for key, point in points.items() if again or key not in record["points"]]


def measure(points: list[Point], args: argparse.Namespace, kept: Path) -> Iterator[tuple[Point, dict[str, Any]]]:
    """All points with their figures, as they are measured."""
    yield from measure_steps([point for point in points if isinstance(point, Work)], rounds=args.rounds)
    starts = [point for point in points if isinstance(point, Start)]
    yield from measure_starts(starts, args.data.absolute(), kept=kept, tiny=args.tiny)


def write(record: dict[str, Any], output: Path, answered: Mapping[str, Question]) -> None:
    """Write the record as JSON, as Markdown and as pictures."""
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / f"{record['device']}.json.unfinished"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(output / f"{record['device']}.json")
    (output / f"{record['device']}.md").write_text(report(record, answered))
    draw(record, answered, output / "pictures")


def main(argv: list[str] | None = None) -> None:
    """Measure, write as it goes, and exit with status 1 if the bound is missed."""
    args = parse(argv)
    every = questions(tiny=args.tiny)
    asked = {name: every[name] for name in args.questions}
    record = begin(args.output, tiny=args.tiny)
    points = missing(record, asked, again=args.again)
    tasks = {point.task for point in points if isinstance(point, Start)}
    for file in (args.data / files[task] for task in tasks for files in (SOURCES, VALIDATION)):
        if not file.is_file():
            sys.exit(f"--data {args.data}: there is no {file}; give the folder that holds wikitext-2/ and sst2/")
    with tempfile.TemporaryDirectory() as kept:
        for point, figures in measure(points, args, Path(kept)):
            record["points"][point.key] = figures
            print(f"{point.key}: {figures['seconds']:.4g} s, {figures['peak_bytes'] / 1e9:.2f} GB", flush=True)
            write(record, args.output, every)
    write(record, args.output, every)
    found = bound(record, every)
    if found is not None and not args.tiny:
        print(
            f"the largest text needs {found / 1e9:.2f} GB more than the smallest; the bound is {BOUND_BYTES / 1e9:g} GB"
        )
        sys.exit(0 if found <= BOUND_BYTES else 1)


if __name__ == "__main__":
    main()
