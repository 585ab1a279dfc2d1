"""From tables of sentences to words and tags: which columns hold them, and the ids of the tags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpeft.data.columns import column_values
from jaxpeft.data.label_values import WITHHELD
from jaxpeft.data.labels import Labels, check_two_classes, with_base_names
from jaxpeft.data.sources import ReadOptions, finished_splits
from jaxpeft.data.splits import EmptyTexts, Split, Splits, take, without_empty
from jaxpeft.data.tables import Tables
from jaxpeft.data.tag_schemes import OUTSIDE, find_scheme
from jaxpeft.data.texts import TextColumn, read_texts
from jaxpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_WORDS = ("tokens", "words", "form")
_TEXTS = ("text", "sentence")
_TAGS = ("ner_tags", "tags", "labels", "label", "pos_tags", "upos")
_SHOWN = 20


def tagged_splits(read: Tables, options: ReadOptions) -> Splits:
    """The splits of tables with a list of words and a list of their tags in each row. `Split.labels` has the ids of the tags.

    The words are in the column `options.text_column`, or in `tokens`, `words` or `form`; the tags in `options.label_column`, or in the
    first that the table has of `ner_tags`, `tags`, `labels`, `label`, `pos_tags` and `upos`. Tags are names or, if all of
    them are whole numbers, ids of the names that the table declares or `options.label_names` lists. Without either, the classes are the
    tags of train, sorted, with "O" first. Classes that the base knows by name get its ids.

    Raises:
      InputError: a column does not exist or does not hold lists, a row has more or fewer tags than words, or a tag is unknown.
    """
    columns = {split: _tag_column(table, read.where[split], options) for split, table in read.tables.items()}
    notes = list(read.notes)
    splits, raw = {}, {}
    for split, table in read.tables.items():
        where, column = read.where[split], columns[split]
        tags = [] if column is None else column_values(table, column)
        if split == "test" and all(_is_withheld(each) for each in tags):
            why = f"{where} has no column of tags" if column is None else f"the tags of {where} are all -1 or empty"
            notes.append(f"{why}: it is not used")
            continue
        if column is None:
            raise InputError(
                f"{where}: no column is known to hold tags ({', '.join(table.column_names)}); give data.label_column"
            )
        words = _words(table, _word_column(table, where, options, _WORDS), where, options.empty_texts)
        labelled = _rows_with_tags(tags, where, drop=options.drop_unlabelled)
        if len(labelled) < len(tags):
            notes.append(f"{len(tags) - len(labelled)} of {len(tags)} rows of {where} have no tags and are left out")
        splits[split] = take(Split(words), labelled)
        raw[split] = [tags[row] for row in labelled]
        _check_lengths(splits[split].texts, raw[split], labelled, where)
    column = columns["train"]
    assert column is not None
    notes += _other_columns(read.tables["train"].column_names, column, options)
    declared = getattr(getattr(read.tables["train"].features[column], "feature", None), "names", None)
    labels = _encoded(raw, read.where, options, None if declared is None else tuple(declared))
    notes += [*labels.notes, _scheme_in_words(labels, raw["train"])]
    for split, rows in splits.items():
        lengths = [len(tags) for tags in raw[split]]
        named = replace(rows, labels=ragged(labels.columns[split], lengths))
        splits[split], note = without_empty(named, read.where[split], options.empty_texts)
        notes += [note] if note else []
    return finished_splits(splits, read, notes, labels.num_labels, labels.names)


def words_to_answer(table: Dataset, where: str, options: ReadOptions) -> Split:
    """The lists of words of a table, or its texts, without tags. Columns of words are looked for first.

    Raises:
      InputError: as `tagged_splits`.
    """
    if options.text_pair_column is not None:
        raise InputError(
            f"data.text_pair_column '{options.text_pair_column}': words of single texts are tagged; leave it out"
        )
    column = _word_column(table, where, options, (*_WORDS, *_TEXTS))
    is_list = hasattr(table.features[column], "feature")
    words = _words(table, column, where, "keep") if is_list else read_texts(table, column, where)
    return Split(words)


def ragged(values: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """`values: [sum of lengths]` cut into rows: `[rows]` objects, each a tuple."""
    rows = np.empty(len(lengths), object)
    flat = iter(values.tolist())
    for i, length in enumerate(lengths):
        rows[i] = tuple(islice(flat, length))
    return rows


def _word_column(table: Dataset, where: str, options: ReadOptions, known: Sequence[str]) -> str:
    names = table.column_names
    if options.text_column is not None:
        return _existing(options.text_column, names, where, "text_column")
    found = next((name for name in known if name in names), None)
    if found is None:
        raise InputError(f"{where}: no column is known to hold words ({', '.join(names)}); give data.text_column")
    return found


def _tag_column(table: Dataset, where: str, options: ReadOptions) -> str | None:
    names = table.column_names
    if options.label_column is not None:
        return _existing(options.label_column, names, where, "label_column")
    return next((name for name in _TAGS if name in names), None)


def _existing(name: str, available: Sequence[str], where: str, flag: str) -> str:
    if name not in available:
        hint = f"{did_you_mean(name, available)}; columns: {', '.join(available)}"
        raise InputError(f"data.{flag}='{name}': {where} has no such column{hint}")
    return name


def _other_columns(names: Sequence[str], column: str, options: ReadOptions) -> list[str]:
    """A note if the column of tags was chosen among several."""
    others = [name for name in names if name != column and (name in _TAGS or name.startswith(("column_", "chunk_")))]
    if options.label_column is not None or not others:
        return []
    return [f"the tags are those of column '{column}'; data.label_column takes another: {', '.join(others)}"]


def _words(table: Dataset, column: str, where: str, empty: EmptyTexts) -> TextColumn:
    """A column of lists of words. With "drop", rows may be None, and must be dropped by the caller."""
    import pyarrow as pa

    kind = table.data.column(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not (pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)):
        raise InputError(
            f"{where}, row 1: column '{column}' holds {str(table[0][column])[:40]!r}, not a list of words; give a .conll file, or "
            ".jsonl or .parquet with a list of words and a list of tags in each row"
        )
    words = TextColumn(table.select_columns([column]), column)
    chunks = table.data.column(column).chunks
    if any(chunk.null_count or chunk.flatten().null_count for chunk in chunks):
        lists: Sequence[Any] = words
        for row, value in enumerate(lists):
            if value is None and empty != "drop":
                raise InputError(
                    f"{where}, row {row + 1}: column '{column}' has no words (null); fill them in, or set data.drop_empty to true to "
                    "leave such rows out"
                )
            if value is not None and None in value:
                raise InputError(
                    f"{where}, row {row + 1}, word {value.index(None) + 1}: column '{column}' has no text there (null); fill it in"
                )
    return words


def _is_withheld(tags: Any) -> bool:
    return not tags or (isinstance(tags, list) and all(tag in (WITHHELD, "", None) for tag in tags))


def _rows_with_tags(tags: Sequence[Any], where: str, *, drop: bool) -> np.ndarray:
    """The rows that have a list of tags, `[n]` int. Rows without one (null) are refused, unless `drop` is set."""
    missing = {row for row, each in enumerate(tags) if each is None}
    if len(missing) == len(tags):
        raise InputError(f"{where}: none of its {len(tags)} rows has tags; give another data.label_column")
    if missing and not drop:
        raise InputError(
            f"{where}, row {min(missing) + 1}: it has no tags (null); leave such rows out with data.drop_unlabelled true, or fill them in"
        )
    return np.asarray([row for row in range(len(tags)) if row not in missing], np.int64)


def _check_lengths(words: Sequence[Any], tags: Sequence[Any], rows: np.ndarray, where: str) -> None:
    for row, these, those in zip(rows.tolist(), words, tags, strict=True):
        if not isinstance(those, list):
            raise InputError(
                f"{where}, row {row + 1}: the tags are {str(those)[:40]!r}, not a list with one for each word; give another "
                "data.label_column"
            )
        if len(these or ()) != len(those):
            raise InputError(
                f"{where}, row {row + 1}: {len(these or ())} words and {len(those)} tags; give one tag for each word"
            )


def _encoded(
    raw: Mapping[str, list[list[Any]]],
    where: Mapping[str, str],
    options: ReadOptions,
    declared: tuple[str, ...] | None,
) -> Labels:
    """The ids of all tags: `columns[split]` has those of all its rows, `[words]`."""
    _check_kinds(raw, where)
    whole = all(isinstance(tag, int) for tag in _all(raw))
    if whole and declared:
        raw = {split: _named(rows, where[split], declared) for split, rows in raw.items()}
        whole = False
    names = tuple(options.label_names) if options.label_names else declared
    if whole and names and not {str(tag) for tag in _all(raw)} <= set(names):
        columns = {
            split: _by_name(_named(rows, where[split], names), where[split], names) for split, rows in raw.items()
        }
    else:
        found = {str(tag) for tags in raw["train"] for tag in tags}
        if names is None:
            names = tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, int(tag) if whole else 0, tag)))
        columns = {split: _by_name(tags, where[split], names) for split, tags in raw.items()}
    labels = Labels(columns, len(names), names, {})
    check_two_classes(labels, f"train ({where['train']})")
    return with_base_names(labels, options.base_names or ())


def _all(raw: Mapping[str, list[list[Any]]]) -> Iterator[Any]:
    return chain.from_iterable(chain.from_iterable(raw.values()))


def _check_kinds(raw: Mapping[str, list[list[Any]]], where: Mapping[str, str]) -> None:
    for split, rows in raw.items():
        for row, tags in enumerate(rows):
            for word, tag in enumerate(tags):
                if not isinstance(tag, str | int) or isinstance(tag, bool) or tag == "":
                    raise InputError(
                        f"{where[split]}, row {row + 1}, word {word + 1}: the tag {tag!r} is neither a name nor an id; correct it"
                    )


def _named(rows: list[list[Any]], where: str, names: Sequence[str]) -> list[list[Any]]:
    """The names of ids. Raises InputError if an id has none."""
    for row, tags in enumerate(rows):
        for word, tag in enumerate(tags):
            if not 0 <= tag < len(names):
                raise InputError(
                    f"{where}, row {row + 1}, word {word + 1}: the tag {tag} is not one of the ids 0 to {len(names) - 1}; correct it, or "
                    "name all classes in data.label_names"
                )
    return [[names[tag] for tag in tags] for tags in rows]


def _by_name(rows: list[list[Any]], where: str, names: Sequence[str]) -> np.ndarray:
    ids = {name: i for i, name in enumerate(names)}
    for row, tags in enumerate(rows):
        for word, tag in enumerate(tags):
            if str(tag) not in ids:
                shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
                raise InputError(
                    f"{where}, row {row + 1}, word {word + 1}: the tag '{tag}' is unknown; known: {shown}; correct it, or list all "
                    "classes in data.label_names"
                )
    return np.fromiter((ids[str(tag)] for tags in rows for tag in tags), np.int32)


def _scheme_in_words(labels: Labels, rows: Sequence[Sequence[Any]]) -> str:
    assert labels.names is not None
    named = iter([labels.names[i] for i in labels.columns["train"].tolist()])
    scheme = find_scheme([tuple(islice(named, len(tags))) for tags in rows])
    if scheme is None:
        return f"{labels.num_labels} tags without a scheme of entities: every word is counted by itself"
    faults = f", except for {scheme.faults} of its entities" if scheme.faults else ""
    return f"{labels.num_labels} tags in the scheme {scheme.name}{faults}; they are trained as they are"
