"""The part of the comparison's report that the README quotes: python -m benchmarks.comparison.table

Writes it between the README's marks, from `report.md` beside this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from benchmarks.readme import write_part

HERE = Path(__file__).parent
BEGIN, END = "<!-- comparison: python -m benchmarks.comparison.table -->", "<!-- end of comparison -->"
PICTURE = "wikitext-2-parameters.svg"
QUOTED = {
    "method": "method",
    "learning rate": "learning rate",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "F1": "F1",
    "against the baseline": "against LoRA",
    "trained": "trained",
    "peak memory of the process (GB)": "memory, GB",
    "tokens/s": "tokens/s",
    "training (s)": "training, s",
    "forgetting": "forgetting",
}
"""Columns of the report → their heads here."""


def tasks(report: str) -> dict[str, list[list[str]]]:
    """Task → the rows of its table, the head first."""
    found = {}
    for section in re.split(r"^## ", report, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        lines = [line for line in body.splitlines() if line.startswith("| ")]
        if lines and lines[0].startswith("| method | learning rate |"):
            found[title] = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return found


def quoted(rows: list[list[str]], heads: Mapping[str, str] = QUOTED) -> list[str]:
    """The lines of a table with only the columns of `heads` that have values."""
    head, *body = rows
    columns = [i for i, name in enumerate(head) if name in heads and any(row[i] != "–" for row in body)]
    lines = [[heads[head[i]] for i in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[row[i] for i in columns] for row in body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def block() -> str:
    """The text between the README's marks."""
    parts = []
    for task, rows in tasks((HERE / "report.md").read_text()).items():
        parts += [f"**{task}**", "", *quoted(rows), ""]
    return "\n".join([*parts, f"![Quality against trained parameters](benchmarks/comparison/pictures/{PICTURE})"])


def main() -> None:
    """Write the README's part."""
    write_part(BEGIN, END, block())


if __name__ == "__main__":
    main()
