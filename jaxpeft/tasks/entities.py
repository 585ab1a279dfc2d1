"""Entities that tags mark, and their figures by seqeval, in its default mode: that of the CoNLL-2000 script `conlleval`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxpeft.data.tag_schemes import as_iobes
from jaxpeft.tasks.by_class import ClassFigures

Tags = Sequence[Sequence[str]]
"""The tags of every sentence, by name."""


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of a sentence: type, first and last word."""
    from seqeval.metrics.sequence_labeling import get_entities

    # seqeval's default mode does not know BILOU, which is IOBES in other letters.
    return get_entities([as_iobes(tag) for tag in tags])


def entity_scores(true: Tags, predicted: Tags) -> tuple[float, float, float]:
    """Precision, recall and F1 of all entities together (micro); 0 if there are none to divide by."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    precision, recall, f1, _ = precision_recall_fscore_support(
        _iobes(true), _iobes(predicted), average="micro", zero_division=0
    )
    return float(precision), float(recall), float(f1)


def entities_by_type(true: Tags, predicted: Tags) -> tuple[ClassFigures, ...]:
    """The figures of every type of the true or the predicted entities, sorted by name. Rows are entities."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    found = precision_recall_fscore_support(_iobes(true), _iobes(predicted), average=None, zero_division=0)
    counts = [Counter(kind for tags in each for kind, _, _ in entities_of(tags)) for each in (true, predicted)]
    types = sorted(counts[0] | counts[1])
    return tuple(
        ClassFigures(kind, counts[0][kind], counts[1][kind], float(precision), float(recall), float(f1))
        for kind, precision, recall, f1, _ in zip(types, *found, strict=True)
    )


def _iobes(sentences: Tags) -> list[list[str]]:
    return [[as_iobes(tag) for tag in tags] for tags in sentences]
