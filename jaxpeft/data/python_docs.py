"""The quickstart's text: the language reference that every CPython carries, so that a first run downloads nothing.

`pydoc_data.topics` holds some 80 help topics, about 350,000 characters of English technical prose (PSF licence).
They overlap: "specialnames" contains "customization" and "attribute-access", "compound" contains "if", "for" and
"with". A split by topic alone would therefore test on what it trained on; here every paragraph stands in exactly one
split, and once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from jaxpeft.data.splits import Split, Splits
from jaxpeft.errors import InputError

# Named, not drawn by a hash: the sizes of topics differ by a factor of a thousand, so a draw would move large topics
# between the splits with every edition of the documentation. These names are the same in Python 3.11 to 3.13, and so
# are their texts but for a few sentences; a topic that a later Python adds goes to train.
_VALIDATION_TOPICS = (
    *("assert", "atom-literals", "augassign", "await", "break", "callable-types", "class", "for", "if"),
    *("numeric-types", "power", "sequence-types", "try", "while", "with"),
)
_TEST_TOPICS = (
    *("bltin-type-objects", "comparisons", "continue", "del", "function", "import", "lambda", "raise", "strings"),
    "truth",
)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a topic, as they stand: prose, examples and grammar."""
    yield from (block for block in re.split(r"\n\s*\n", text) if block.strip())


def paragraph_key(paragraph: str) -> str:
    """The same for paragraphs that differ only in indentation and line breaks."""
    return " ".join(paragraph.split())


def split_topics(topics: Mapping[str, str]) -> dict[str, list[str]]:
    """Topics (name to text) as `{"train", "validation", "test"}` to paragraphs, each paragraph in one place only.

    A paragraph of several topics goes to the first split of validation, test, train that has one of them.
    """
    held_out = {*_VALIDATION_TOPICS, *_TEST_TOPICS}
    replicas = {
        "validation": _VALIDATION_TOPICS,
        "test": _TEST_TOPICS,
        "train": tuple(sorted(topics.keys() - held_out)),  # sorted: the order of the dict is not promised
    }
    seen: set[str] = set()
    splits: dict[str, list[str]] = {name: [] for name in replicas}
    for split, names in replicas.items():
        for paragraph in (found for name in names for found in paragraphs(topics.get(name, ""))):
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                splits[split].append(paragraph)
    return splits


def load_python_docs() -> Splits:
    """The running Python's language reference as unlabelled `Splits`, one paragraph a row.

    About 80/10/10 % by characters; the text is the interpreter's, so numbers measured on it compare within one Python
    version. Raises InputError where the interpreter was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "python-docs: this Python has no pydoc_data module (a stripped-down package);"
            " give train_file=PATH or another dataset, such as wikitext-2-raw-v1"
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
