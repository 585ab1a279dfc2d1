"""Make a file of named entities from a text, by rule, for configs/token-classification.yaml.

    python -m benchmarks.make_ner text.txt ner.conll

The text is English, with a paragraph per line, such as WikiText-2's train.txt. The tags are IOB2:

- NAME: two or more words with a capital letter in a row, except for the first word of a sentence;
- YEAR: a number from 1000 to 2099 without a separator;
- NUMBER: any other number in digits, also with separators (`10,000`, or `10 @,@ 000` in WikiText).

These are not entities that a person has marked. They show that training works, and not how good it is on other data.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

_WORD = re.compile(r"@[.,-]@|<unk>|\d+(?:[.,]\d+)*|\w+(?:[-'’]\w+)*|[^\w\s]")
_ENDS = (".", "!", "?")
_CAPITALISED = re.compile(r"[A-Z][^\W\d_]+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_YEAR = re.compile(r"1\d{3}|20\d{2}")


def sentences(lines: Iterable[str]) -> Iterator[list[str]]:
    """The words of each sentence of a text. Headings (`= Title =`) and pieces of fewer than four words are left out."""
    for line in lines:
        if line.strip().startswith("="):
            continue
        sentence: list[str] = []
        for word in _WORD.findall(line):
            sentence.append(word)
            if word in _ENDS:
                if len(sentence) >= 4:
                    yield sentence
                sentence = []


def tags(words: Sequence[str]) -> list[str]:
    """The tags of a sentence, by the rules above."""
    found = ["O"] * len(words)
    start = 0
    while start < len(words):
        kind, stop = _entity(words, start)
        if kind:
            found[start:stop] = [f"B-{kind}", *[f"I-{kind}"] * (stop - start - 1)]
        start = stop
    return found


def _entity(words: Sequence[str], start: int) -> tuple[str | None, int]:
    """The type of the entity that begins at `start`, or None, and the word behind it."""
    stop = start
    if start and _CAPITALISED.fullmatch(words[start]):
        while stop < len(words) and _CAPITALISED.fullmatch(words[stop]):
            stop += 1
        return ("NAME" if stop - start > 1 else None), stop
    if not _NUMBER.fullmatch(words[start]):
        return None, start + 1
    stop = start + 1
    while stop + 1 < len(words) and words[stop] in ("@,@", "@.@") and _NUMBER.fullmatch(words[stop + 1]):
        stop += 2
    is_year = stop == start + 1 and _YEAR.fullmatch(words[start])
    return ("YEAR" if is_year else "NUMBER"), stop


def main() -> None:
    """Read the text and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="A text file in UTF-8.")
    parser.add_argument("output", type=Path, help="The .conll file to write.")
    parser.add_argument("--sentences", type=int, default=4000, help="At most so many sentences.")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    with arguments.text.open(encoding="utf-8") as lines, arguments.output.open("w", encoding="utf-8") as out:
        for words in islice(sentences(lines), arguments.sentences):
            of_sentence = tags(words)
            counts["sentences"] += 1
            counts.update(tag[2:] for tag in of_sentence if tag.startswith("B-"))
            out.writelines(f"{word} {tag}\n" for word, tag in zip(words, of_sentence, strict=True))
            out.write("\n")
    print(", ".join(f"{number:,} {name}" for name, number in counts.items()), "→", arguments.output)


if __name__ == "__main__":
    main()
