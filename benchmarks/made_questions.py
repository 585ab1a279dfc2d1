"""Questions for trying question answering, made from WikiText-2 by a rule. They measure nothing but that training works.

    python -m benchmarks.made_questions                          # texts from the hub
    python -m benchmarks.made_questions --texts wikitext-2       # from train.txt, valid.txt and test.txt there

Writes `made-questions/{train,validation,test}.json` in the format of SQuAD 2.0, which `configs/question-answering.yaml` reads. The
context is a paragraph. The rules for a question:

- "… was built in 1924 …" makes "… was built in which year?", and the year is its answer.
- "Anna Holm was born in …" makes "Who or what was born in …?", and the capitalised words are its answer.
- A question of the last paragraph whose answer is not in this one has no answer here.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_YEAR = re.compile(r"\b[Ii]n (1[5-9]\d\d|20[01]\d)\b(?! ?[-–])")
_NAME = re.compile(r"((?:[A-Z][a-z]+ )+)((?:was|is|became|won|wrote|had|made|played|took|began) [^.;]+)")
_NOT_NAMES = {
    "The",
    "It",
    "He",
    "She",
    "They",
    "This",
    "There",
    "In",
    "A",
    "An",
    "These",
    "His",
    "Her",
    "That",
    "We",
    "I",
}
_WORDS_OF_A_QUESTION = 10
_FEWEST_LETTERS = 200


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, help="directory with train.txt, valid.txt and test.txt")
    parser.add_argument("--output", type=Path, default=Path("made-questions"), help="directory of the files")
    parser.add_argument("--most", type=int, default=5000, help="most training questions; the others have a tenth")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for split, lines in _lines(options.texts).items():
        most = options.most if split == "train" else options.most // 10
        document = made_document(lines, most)
        path = options.output / f"{split}.json"
        path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        print(f"{path}: {sum(len(p['qas']) for p in document['data'][0]['paragraphs']):,} questions")


def _lines(texts: Path | None) -> dict[str, Iterable[str]]:
    if texts is not None:
        names = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
        return {split: (texts / name).read_text(encoding="utf-8").splitlines() for split, name in names.items()}
    from jaxpeft.data import load_splits

    splits = load_splits("wikitext-2-v1", use_labels=False)
    assert splits.test is not None
    return {"train": splits.train.texts, "validation": splits.validation.texts, "test": splits.test.texts}


def made_document(lines: Iterable[str], most: int) -> dict[str, Any]:
    """A document of SQuAD 2.0 with at most `most` questions about the paragraphs among `lines`, which are WikiText's."""
    paragraphs: list[dict[str, Any]] = []
    before: Sequence[tuple[str, str]] = ()
    number = 0
    for line in lines:
        context = as_written(line)
        if len(context) < _FEWEST_LETTERS or context.startswith("="):
            continue
        found = list(questions(context))
        asked = [(question, {"text": answer, "answer_start": start}) for question, answer, start in found[:2]]
        none = next((question for question, answer in before if answer not in context), None)
        before = [(question, answer) for question, answer, _ in found]
        qas = [{"question": question, "answers": [answer], "is_impossible": False} for question, answer in asked]
        qas += [{"question": none, "answers": [], "is_impossible": True}] if none and number % 2 else []
        number += 1
        qas = qas[:most]
        most -= len(qas)
        if qas:
            named = [{"id": f"{len(paragraphs)}-{i}", **qa} for i, qa in enumerate(qas)]
            paragraphs.append({"context": context, "qas": named})
        if not most:
            break
    return {"version": "made by rule", "data": [{"title": "WikiText-2", "paragraphs": paragraphs}]}


def questions(context: str) -> Iterator[tuple[str, str, int]]:
    """(question, answer, its first character) of the rules, for every sentence of `context`. An answer occurs once in it."""
    start = 0
    for sentence in re.split(r"(?<=[.!?]) ", context):
        year, name = _YEAR.search(sentence), _NAME.match(sentence)
        if year and context.count(year[1]) == 1:
            words = sentence[: year.start()].split()[-_WORDS_OF_A_QUESTION:]
            if len(words) >= 3:
                yield f"{' '.join(words)} in which year?", year[1], start + year.start(1)
        if name and name[1].split()[0] not in _NOT_NAMES and context.count(name[1].strip()) == 1:
            words = name[2].split()[:_WORDS_OF_A_QUESTION]
            yield f"Who or what {' '.join(words)}?", name[1].strip(), start + name.start(1)
        start += len(sentence) + 1


def as_written(line: str) -> str:
    """A line of WikiText without the blanks of its tokenisation."""
    text = re.sub(r" @([-.,])@ ", r"\1", line.strip())
    text = re.sub(r" ([,.;:!?)'])", r"\1", text)
    return re.sub(r"\( ", "(", text)


if __name__ == "__main__":
    main()
