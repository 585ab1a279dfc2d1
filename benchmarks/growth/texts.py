"""Training files of any size: the lines of a real file, again and again, each time in another order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

SOURCES = {"masked-lm": "wikitext-2/train.txt", "classification": "sst2/train-sentences.tsv"}
"""Task → the file of `--data` whose lines are repeated."""
_SUFFIX = {"masked-lm": ".txt", "classification": ".tsv"}


def write_file(task: str, data: Path, size: int, directory: Path) -> Path:
    """Write a training file of at least `size` bytes (masked-lm), or of `size` rows (classification); return its path."""
    path = directory / f"train-{size}{_SUFFIX[task]}"
    written, lines = 0, shuffled((data / SOURCES[task]).read_text(encoding="utf-8").splitlines())
    with path.open("w", encoding="utf-8", newline="\n") as file:
        while written < size:
            line = f"{next(lines)}\n"
            file.write(line)
            written += 1 if task == "classification" else len(line.encode())
    return path


def shuffled(lines: list[str]) -> Iterator[str]:
    """The lines that are not blank, without end: all of them in one order, then in another one."""
    filled = [line for line in lines if line.strip()]
    for repetition in count():
        yield from (filled[i] for i in np.random.default_rng(repetition).permutation(len(filled)))
