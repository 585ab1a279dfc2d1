"""The quickstart's text: the language reference that comes with every CPython, so that a first run downloads nothing.

`pydoc_data.topics` holds some 80 help topics, about 350,000 characters of English technical prose (PSF licence).
They overlap: "specialnames" contains "customization" and "attribute-access", "compound" contains "if", "for" and
"with". If the split were only by topic, a model would be tested on text that it was trained on. Here every paragraph
occurs once, in exactly one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from jaxpeft.data.splits import Split, Splits
from jaxpeft.errors import InputError

# Listed by name, not drawn by a hash: topics differ in size by a factor of a thousand, so a draw would move large topics
# between the splits with every edition of the documentation. Python 3.11 to 3.13 have the same names, and nearly the
# same texts. A topic that a later Python adds goes to train.
_VALIDATION_TOPICS = (
    *("assert", "atom-literals", "augassign", "await", "break", "callable-types", "class", "for", "if"),
    *("numeric-types", "power", "sequence-types", "try", "while", "with"),
)
_TEST_TOPICS = (
    *("bltin-type-objects", "comparisons", "continue", "del", "function", "import", "lambda", "raise", "strings"),
    "truth",
)


def paragraphs(text: str) -> Iterator[str]:
    """The unchanged paragraphs of a topic: prose, examples and grammar."""
    yield from (block for block in re.split(r"\n\s*\n", text) if block.strip())


def paragraph_key(paragraph: str) -> str:
    """A key that is equal for paragraphs that differ only in indentation and line breaks."""
    return " ".join(paragraph.split())


def split_topics(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Split the paragraphs of topics (name to text) into "train", "validation" and "test", each paragraph only once.

    A paragraph of several topics goes to the first of validation, test and train that has one of these topics.
    """
    held_out = {*_VALIDATION_TOPICS, *_TEST_TOPICS}
    names_of_split = {
        "validation": _VALIDATION_TOPICS,
        "test": _TEST_TOPICS,
        "train": tuple(sorted(topics.keys() - held_out)),  # sorted, because a set has no fixed order
    }
    seen: set[str] = set()
    splits: dict[str, list[str]] = {name: [] for name in names_of_split}
    for split, names in names_of_split.items():
        for paragraph in (found for name in names for found in paragraphs(topics.get(name, ""))):
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                splits[split].append(paragraph)
    return splits


def load_python_docs() -> Splits:
    """The running Python's language reference as unlabelled `Splits`, one paragraph per row.

    The splits have about 80, 10 and 10 % of the characters. The text is the interpreter's own, so compare numbers only
    within one Python version. Raises InputError if the interpreter was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "python-docs: this Python has no pydoc_data module (a stripped-down package);"
            " give data.train_file or another data.name, such as wikitext-2-raw-v1"
        ) from error
    splits = {name: Split(texts) for name, texts in split_topics(topics).items()}
    return Splits(
        train=splits["train"],
        validation=splits["validation"],
        test=splits["test"],
        num_labels=None,
        label_names=None,
        source="python-docs: pydoc_data.topics of the running Python, split by topic",
    )
