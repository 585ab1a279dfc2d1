"""The tables of docs/sparsity_study.md, out of the reports of its two studies: python -m benchmarks.sparsity.table"""

from __future__ import annotations

from benchmarks.comparison.table import quoted, tasks
from benchmarks.readme import ROOT, write_part

PAGE = ROOT / "docs/sparsity_study.md"
STUDIES = ("sparsity", "four_methods")
QUOTED = {
    "method": "method",
    "learning rate": "learning rate",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "against the baseline": "against LoRA",
    "kept": "parameters kept",
    "file (MB)": "file, MB",
    "tokens/s": "tokens/s",
    "training (s)": "training, s",
}
"""Columns of the reports → their heads here."""


def marks(study: str) -> tuple[str, str]:
    """The two marks between which the tables of a study stand."""
    return f"<!-- {study}: python -m benchmarks.sparsity.table -->", f"<!-- end of {study} -->"


def block(study: str) -> str:
    """The tables of a study: one for each task."""
    parts = []
    for task, rows in tasks((ROOT / "benchmarks" / study / "report.md").read_text()).items():
        parts += [f"**{task}**", "", *quoted(rows, QUOTED), ""]
    return "\n".join(parts).rstrip()


def main() -> None:
    """Write the tables of the studies that have a report into the page, and say which have none."""
    for study in STUDIES:
        if (ROOT / "benchmarks" / study / "report.md").is_file():
            write_part(*marks(study), block(study), PAGE)
        else:
            print(f"{study} has no report yet: python -m jaxpeft compare --config benchmarks/{study}/study.yaml")


if __name__ == "__main__":
    main()
