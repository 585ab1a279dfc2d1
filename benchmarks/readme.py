"""The parts of the README and of docs/ that commands write, each between two marks."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def write_part(begin: str, end: str, text: str, file: Path = README) -> None:
    """Put `text` between the marks `begin` and `end` of `file`."""
    before, rest = file.read_text().split(begin)
    file.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
