"""The parts of the README that commands write, each between two marks."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def write_part(begin: str, end: str, text: str) -> None:
    """Put `text` between the marks `begin` and `end`."""
    before, rest = README.read_text().split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")
