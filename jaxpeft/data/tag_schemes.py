"""Schemes of tags: how B-, I- and other prefixes mark the entities of a sentence.

| scheme | an entity of three words | of one word | after another one of its type |
|---|---|---|---|
| IOB1 (Ramshaw & Marcus 1995) | I I I | I | begins with B |
| IOB2 | B I I | B | the same |
| IOE2 | I I E | E | the same |
| IOBES | B I E | S | the same |
| BILOU (Ratinov & Roth 2009) | B I L | U | the same |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

OUTSIDE = "O"
"""The tag of a word that is in no entity."""

_ENTITY = re.compile(r"([BIESLU])-(.+)", re.DOTALL)


def has_scheme(names: Iterable[str]) -> bool:
    """True if the tags mark entities: all but "O" have a prefix. Other tags, such as parts of speech, stand for themselves."""
    others = [name for name in names if name != OUTSIDE]
    return bool(others) and all(map(_ENTITY.fullmatch, others))


@dataclass(frozen=True)
class Scheme:
    """The scheme of some tags.

    Attributes:
      name: its name.
      faults: number of entities that begin in a way the scheme does not allow, such as with I- in IOB2.
    """

    name: str
    faults: int = 0


def find_scheme(sentences: Iterable[Sequence[str]]) -> Scheme | None:
    """The scheme of the tags of some sentences, or None if they have none."""
    pairs: dict[tuple[str, str], int] = {}  # a tag and its predecessor; there are few different ones
    for tags in sentences:
        for pair in pairwise((OUTSIDE, *tags)):
            pairs[pair] = pairs.get(pair, 0) + 1
    names = {tag for _, tag in pairs}
    if not has_scheme(names):
        return None
    prefixes = {name[0] for name in names if name != OUTSIDE}
    if prefixes & set("LU"):
        return Scheme("BILOU")
    if "E" in prefixes and not prefixes & set("BS"):
        return Scheme("IOE2")
    if prefixes & set("ES"):
        return Scheme("IOBES")
    # An entity begins with I in IOB1, unless the word before is of the same type: only there it begins with B.
    with_i = sum(n for (before, tag), n in pairs.items() if tag[0] == "I" and before[1:] != tag[1:])
    with_b = sum(n for (before, tag), n in pairs.items() if tag[0] == "B" and before[1:] != tag[1:])
    return Scheme("IOB1", with_b) if with_i > with_b else Scheme("IOB2", with_i)


def as_iobes(tag: str) -> str:
    """`tag` with the prefixes of IOBES if it is one of BILOU. All other tags stay as they are."""
    return {"L": "E", "U": "S"}.get(tag[:1], tag[:1]) + tag[1:] if _ENTITY.fullmatch(tag) else tag
