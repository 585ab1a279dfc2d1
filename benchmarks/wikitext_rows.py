"""Rows for two tasks, made by rule from WikiText: python -m benchmarks.wikitext_rows topics|pairs WIKITEXT.txt ROWS.jsonl

They are for trying the tasks on real text without a download; nobody has checked a label.

topics: for multi-label. A text is a paragraph. Its classes are the topics of its article: those of which the whole article has at
    least 8 key words. Many articles have several topics, and some have none.
pairs: for pair scoring. A query is an article's title with that of a section. The text that belongs to it is the section's first
    paragraph (label 1); four others (label 0) are from other sections, two of the same article if it has them.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

TOPICS = {
    "sport": "season league team match game player goal coach cup club championship football baseball hockey race",
    "music": "album song band music single chart recorded track vocals guitar tour concert lyrics billboard",
    "screen": "film episode series television character scene director cast actor script aired viewers video",
    "war": "army battle war troops regiment navy ship fleet division gun attack command enemy squadron forces",
    "nature": "species river water storm hurricane tropical wind forest bird animal island mountain plant sea",
    "politics": "government election president party minister law court political state council vote policy congress",
}
FEWEST_KEY_WORDS = 8
SHORTEST, LONGEST = 80, 400
"""Letters of a paragraph: shorter ones are left out, and longer ones are cut."""


@dataclass
class Article:
    """An article: its title, and the paragraphs of each section by the section's title ("" before the first)."""

    title: str
    sections: dict[str, list[str]] = field(default_factory=dict)

    @property
    def paragraphs(self) -> list[str]:
        """All paragraphs in their order."""
        return [paragraph for section in self.sections.values() for paragraph in section]

    @property
    def topics(self) -> list[str]:
        """The topics with enough key words."""
        words = Counter(re.findall(r"[a-z]+", " ".join(self.paragraphs).lower()))
        return [topic for topic, keys in TOPICS.items() if sum(words[key] for key in keys.split()) >= FEWEST_KEY_WORDS]


def articles(lines: Iterator[str]) -> Iterator[Article]:
    """The articles of WikiText's lines."""
    article, section = None, ""
    for line in lines:
        heading = re.fullmatch(r"((?:= )+)(.*?)((?: =)+)", line.strip())
        if heading and heading[1].strip() == "=":
            if article:
                yield article
            article, section = Article(plain(heading[2])), ""
        elif heading:
            section = plain(heading[2])
        elif article and len(text := plain(line)) >= SHORTEST:
            article.sections.setdefault(section, []).append(text[:LONGEST])
    if article:
        yield article


def plain(text: str) -> str:
    """A line without WikiText's marks: 17th @-@ place → 17th-place."""
    text = re.sub(r" ?<unk>", "", re.sub(r" @(.)@ ", r"\1", text)).strip()
    return re.sub(r" ([,.;:!?)%])|(\() ", r"\1\2", text)


def topic_rows(found: list[Article]) -> Iterator[dict[str, object]]:
    """A row for each paragraph."""
    for article in found:
        yield from ({"text": text, "labels": article.topics} for text in article.paragraphs)


def pair_rows(found: list[Article]) -> Iterator[dict[str, object]]:
    """Five rows for each section."""
    rng = random.Random(0)
    for article in found:
        for section, paragraphs in article.sections.items():
            own = [text for other, texts in article.sections.items() if other != section for text in texts]
            near = rng.sample(own, min(2, len(own)))
            others = rng.sample([other for other in found if other is not article and other.sections], 4 - len(near))
            texts = [paragraphs[0], *near, *(rng.choice(other.paragraphs) for other in others)]
            query = f"{article.title}: {section}" if section else article.title
            yield from ({"query": query, "text": text, "label": int(i == 0)} for i, text in enumerate(texts))


def main(what: str, source: str, target: str) -> None:
    """Write the rows of the kind `what`."""
    make = {"topics": topic_rows, "pairs": pair_rows}[what]
    with open(source, encoding="utf-8") as lines:
        rows = list(make(list(articles(lines))))
    with open(target, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows):,} rows in {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
