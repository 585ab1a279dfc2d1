"""Pairs of texts from WikiText-2, for sentence embeddings: the first two sentences of every paragraph belong together.

    python -m benchmarks.wikitext_pairs pairs                                   # from the hub
    python -m benchmarks.wikitext_pairs pairs --source wikitext-2               # from train.txt, valid.txt and test.txt in a directory

It writes `train.jsonl`, `validation.jsonl` and `test.jsonl` with the columns `anchor` and `positive`. Headings are left out, and so are
paragraphs whose first two sentences do not have six words each. No person has judged these pairs: they are a rule, to have real text
to train on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxpeft.data import read_tables

_END = re.compile(r"(?<= [.!?]) (?=[A-Z\"])")
_FEWEST_WORDS = 6
_FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}


def pairs_of(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first two sentences of every paragraph in `lines`, one paragraph a line."""
    for line in lines:
        sentences = _END.split(line.strip())[:2]
        is_heading = line.strip().startswith("=")
        if not is_heading and len(sentences) == 2 and min(len(s.split()) for s in sentences) >= _FEWEST_WORDS:
            yield sentences[0], sentences[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the lines of all splits, and write their pairs."""
    parser = argparse.ArgumentParser(description="Make pairs of consecutive sentences from WikiText-2.")
    parser.add_argument("output", type=Path, help="a directory for train.jsonl, validation.jsonl and test.jsonl")
    parser.add_argument(
        "--source", type=Path, help="a directory with train.txt, valid.txt and test.txt; default: the hub"
    )
    values = parser.parse_args(arguments)
    if values.source:
        found = read_tables(**{f"{split}_file": str(values.source / name) for split, name in _FILES.items()})
    else:
        found = read_tables("wikitext-2-raw-v1")
    values.output.mkdir(parents=True, exist_ok=True)
    for split, table in found.tables.items():
        pairs = [{"anchor": first, "positive": second} for first, second in pairs_of(table["text"])]
        with (values.output / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        print(f"{split}: {len(pairs):,} pairs from {len(table):,} lines")


if __name__ == "__main__":
    main()
