"""The record in Markdown: the whole of it for the results folder, and the part that the README quotes.

    python -m benchmarks.speed.table

writes the README's part between its marks, from `results/cpu.json` and, where there are any, the records of other devices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.readme import write_part
from benchmarks.speed.cases import CASES, VARIANTS
from benchmarks.speed.rounds import ROOT

RESULTS = ROOT / "benchmarks" / "speed" / "results"
BEGIN, END = "<!-- speed: python -m benchmarks.speed.table -->", "<!-- end of speed -->"

Record = Mapping[str, Any]


def machine_line(record: Record) -> str:
    """What it was measured on, in one sentence."""
    m, versions = record["machine"], record["versions"]
    both = {**versions["theirs"], **versions["ours"]}
    packages = ", ".join(f"{name} {number}" for name, number in both.items() if name != "transformers")
    transformers = sorted({side["transformers"] for side in versions.values()})
    device = "" if record["device"] == "cpu" else f"{record['device_name']}, "
    return (
        f"{device}{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}, Python {m['python']}; {packages}, "
        f"transformers {' and '.join(transformers)}"
    )


def full_table(record: Record) -> str:
    """All figures of a record."""
    parts = [f"# Speed on {record['device_name']}", "", f"`python -m benchmarks.speed`: {machine_line(record)}.", ""]
    parts += [
        "Matrix products (here: of the last run; `of peak` is of the better side's best of the row's own run, which is said below it):",
        "",
        *_peaks(record),
        "",
    ]
    for name, methods in record["cases"].items():
        parts += [f"## {_title(name)}", "", *_case(methods), ""]
    if record.get("startup"):
        parts += ["## Start", "", _startup(record), ""]
    parts += ["## Bounds", "", *_bounds(record), ""]
    return "\n".join(parts)


def _title(case: str) -> str:
    return CASES[case].title if case in CASES else case


def _peaks(record: Record) -> list[str]:
    lines = ["| dtype | product | XLA, GFLOP/s | torch, GFLOP/s |", "|---|---|---:|---:|"]
    for dtype, rates in record["peaks"].items():
        for ours, theirs in zip(rates["ours"], rates["theirs"], strict=True):
            size = " × ".join(map(str, ours["size"]))
            lines.append(f"| {dtype} | {size} | {ours['rate'] / 1e9:,.0f} | {theirs['rate'] / 1e9:,.0f} |")
    return lines


def _case(methods: Record) -> list[str]:
    lines = [
        "| method | side | step, s | tokens/s | texts/s | ours is faster by | peak memory, GB (with the start) | first steps' surplus, s "
        "| GFLOP a step (counted) | GFLOP/s | of peak |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, row in methods.items():
        for column in ("ours", *VARIANTS):
            if column in row.get("empty", {}):
                lines.append(f"| {method} | PEFT, {column} | – | – | – | – | – | – | – | – | – |")
            if column not in row:
                continue
            c = row[column]
            side = column if column == "ours" else f"PEFT, {column}"
            faster = "" if column == "ours" else _spread(row["ratios"][column], "×")
            lines.append(
                f"| {method} | {side} | {c['seconds']:.4g} | {c['tokens_per_second']:,.0f} | {c['rows_per_second']:,.1f} | {faster} "
                f"| {c['peak_bytes'] / 1e9:.2f} ({c['peak_bytes_with_start'] / 1e9:.2f}) | {c['compile_seconds']:.1f} "
                f"| {c['flops'] / 1e9:,.0f} ({c['counted_flops'] / 1e9:,.0f}) | {c['flops_per_second'] / 1e9:,.0f} "
                f"| {100 * c['share_of_peak']:.0f} % |"
            )
    relative = [
        f"{method} {_spread(row['step_over_lora'], '')}" for method, row in methods.items() if "step_over_lora" in row
    ]
    reasons = [f"{method}: {why}" for method, row in methods.items() for why in row.get("empty", {}).values()]
    lines += ["", f"Our step time over LoRA's of the same rounds: {', '.join(relative)}."] if relative else []
    lines += ["", f"Left empty: {'; '.join(reasons)}."] if reasons else []
    return [*lines, "", *_measured(methods)]


def _measured(methods: Record) -> list[str]:
    """When and how the rows of a case were measured, those alike together."""
    alike: dict[str, list[str]] = {}
    for method, row in methods.items():
        m = row["measured"]
        how = f"{m['rounds']} rounds, commit {m['commit']}, peak {m['peak'] / 1e9:,.0f} GFLOP/s"
        alike.setdefault(how, []).append(f"{method} {m['at']}")
    return [f"{how}: {', '.join(which)}." for how, which in alike.items()]


def _spread(figure: Record, unit: str) -> str:
    return f"{figure['median']:.2f}{unit} ({figure['min']:.2f} to {figure['max']:.2f})"


def _startup(record: Record) -> str:
    s = record["startup"]
    low, high = s["warm_spread"]
    return (
        f"From `python train.py` (the quickstart) to its first step: {s['warm_seconds']:.1f} s with a warm compilation cache "
        f"({low:.1f} to {high:.1f}), {s['cold_seconds']:.1f} s with an empty one ({s['measured']['at']})."
    )


def _bounds(record: Record) -> list[str]:
    lines = ["| what | measured | bound | |", "|---|---:|---:|---|"]
    for bound in record["bounds"]:
        sign = "≥" if bound["least"] else "≤"
        met = "met" if bound["met"] else "MISSED"
        lines.append(f"| {bound['what']} | {bound['value']:.4g} | {sign} {bound['limit']:g} | {met} |")
    return lines


def readme_block(records: list[Record]) -> str:
    """What the README says of speed: LoRA of every case beside PEFT, our methods beside LoRA, the start."""
    return "\n\n".join(_readme_part(record) for record in records)


def _readme_part(record: Record) -> str:
    lines = [
        "| LoRA, rank 8 on query and value | tokens/s | times PEFT eager | times PEFT eager with logits of the masked tokens only "
        "| times PEFT compiled | peak memory: ours, PEFT eager | share of the matrix peak |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, methods in record["cases"].items():
        if "ours" not in methods.get("lora", {}):
            continue
        row = methods["lora"]
        faster = [
            f"{row['ratios'][variant]['median']:.2f}×" if variant in row["ratios"] else "–"
            for variant in ("eager", "eager-masked", "compile")
        ]
        memory = [f"{row[side]['peak_bytes'] / 1e9:.2f} GB" for side in ("ours", "eager") if side in row]
        lines.append(
            f"| {_title(name)} | {row['ours']['tokens_per_second']:,.0f} | {' | '.join(faster)} | {', '.join(memory)} "
            f"| {100 * row['ours']['share_of_peak']:.0f} % |"
        )
    rows = [row for methods in record["cases"].values() for row in methods.values()]
    dates = sorted(row["measured"]["at"][:10] for row in rows)
    rounds = sorted({row["measured"]["rounds"] for row in rows})
    peaks = sorted(round(row["measured"]["peak"] / 1e9) for row in rows)
    *others, most = map(str, rounds)
    number = f"{', '.join(others)} or {most}" if others else most
    turns = (
        "The factors are PEFT's time divided by jaxpeft's: above 1, jaxpeft is faster. "
        f"They are medians of {number} rounds in which the two sides take turns."
    )
    said = [f"{turns} {_methods(record)}".strip()]
    said += [_startup(record)] if record.get("startup") else []
    when = " to ".join(sorted({dates[0], dates[-1]}))
    reached = " to ".join(f"{peak:,}" for peak in sorted({peaks[0], peaks[-1]}))
    said += [f"Measured on {machine_line(record)}; {when}, where matrix products reached {reached} GFLOP/s."]
    return "\n".join([*lines, "", *said])


def _methods(record: Record) -> str:
    for name, methods in record["cases"].items():
        figures = [
            f"{m} {row['step_over_lora']['median']:.2f}" for m, row in methods.items() if "step_over_lora" in row
        ]
        if figures:
            return f"Step time relative to jaxpeft's own LoRA ({_title(name)}): {', '.join(figures)}."
    return ""


def stored_records() -> list[Record]:
    """The records in the results folder, the CPU's first."""
    files = sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem != "cpu", path.stem))
    return [json.loads(path.read_text()) for path in files]


def main() -> None:
    """Write the README's part."""
    write_part(BEGIN, END, readme_block(stored_records()))


if __name__ == "__main__":
    main()
