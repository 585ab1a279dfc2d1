"""One entry point for every source of text: the built-in one, local files, and the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxpeft.data.columns import Columns, choose_columns, class_names, column_values
from jaxpeft.data.files import read_file
from jaxpeft.data.glue import GLUE
from jaxpeft.data.hub import KNOWN_NAMES, read_hub
from jaxpeft.data.label_values import WITHHELD
from jaxpeft.data.labels import Labels, check_two_classes, encode_labels
from jaxpeft.data.python_docs import load_python_docs
from jaxpeft.data.splits import EmptyTexts, Split, Splits, hold_out, take, without_empty
from jaxpeft.data.texts import read_texts
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, eq=False)
class _Tables:
    """The tables of a source, before their columns are interpreted."""

    tables: Mapping[str, Dataset]  # by split: train, and validation and test if the source has them
    where: Mapping[str, str]  # by split, for errors
    source: str
    notes: tuple[str, ...] = ()


def load_splits(
    name: str | None = None,
    *,
    subset: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    test_file: str | None = None,
    column_names: Sequence[str] | None = None,
    delimiter: str | None = None,
    quotes: bool | None = None,
    encoding: str | None = None,
    field: str | None = None,
    glob: bool = False,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    base_names: Sequence[str] | None = None,
    drop_unlabelled: bool = False,
    use_labels: bool = True,
    empty_texts: EmptyTexts = "keep",
    validation_split: str | None = None,
    test_split: str | None = None,
) -> Splits:
    """Load the train, validation and test rows of a dataset: from local files if `train_file` is given, else by name.

        load_splits("glue/sst2")
        load_splits(train_file="reviews.csv", text_column="review", label_column="stars")

    Without a validation split, 10 % of train is held out. A test split without labels (GLUE's are all -1) is dropped.
    `notes` of the result reports both.

    Args:
      name: "python-docs", a WikiText config ("wikitext-2-raw-v1"), "glue/TASK", or the id of a hub dataset.
      subset: the config name of a hub dataset that has several.
      train_file: a .txt, .csv, .tsv, .json, .jsonl or .parquet file; overrides `name`.
      validation_file: the same for validation.
      test_file: the same for test.
      column_names: the columns of .csv and .tsv files that have no header line.
      delimiter: the character between the fields of .csv and .tsv files; None finds it.
      quotes: whether fields of .csv and .tsv files may stand in double quotes; None finds it.
      encoding: the encoding of files of text; None is UTF-8, or what a byte order mark says.
      field: the key of the rows in a .json file that is one object.
      glob: True if `train_file` and the others are patterns of several files.
      text_column: the column of the text; None takes `text` or a GLUE task's columns.
      text_pair_column: the column of the second text, or None.
      label_column: the column of the label; None takes `label` if there is one.
      label_names: the names of the classes in the order of their ids; None sorts the names found in train.
      num_labels: the number of classes, 1 for regression; None counts those in train.
      base_names: the names of the base's classes in the order of their ids; classes of the same names take its ids.
      drop_unlabelled: leave out rows without a label, instead of refusing them.
      use_labels: False leaves the labels unread, for masked language modelling.
      empty_texts: "keep" rows without a text, "refuse" them, or "drop" them, which `notes` reports.
      validation_split: the hub's name of the split to validate on; None is "validation" (MNLI: "validation_matched").
      test_split: the hub's name of the split to test on; None is "test".

    Raises:
      InputError: a file, dataset, split or column does not exist, cannot be reached or read, or has no rows.
    """
    if train_file is None and (validation_file or test_file):
        raise InputError(f"{validation_file or test_file} is given without data.train_file; give it, or neither")
    if train_file is None and name is None:
        raise InputError(
            f"no dataset: set data.name (such as {', '.join(KNOWN_NAMES[:2])} or glue/sst2) or data.train_file"
        )
    if train_file is None and name == "python-docs":
        return load_python_docs()
    if train_file is not None:
        files = {"train": train_file, "validation": validation_file, "test": test_file}
        reading = {
            "column_names": column_names,
            "delimiter": delimiter,
            "quotes": quotes,
            "encoding": encoding,
            "field": field,
        }
        read = _from_files({split: path for split, path in files.items() if path}, name, {**reading, "glob": glob})
    else:
        read = _from_hub(str(name), subset, validation_split, test_split)
        # GLUE's columns have names of their own, so the task decides unless the user does.
        if (task := GLUE.get(str(name).removeprefix("glue/"))) is not None and text_column is None:
            text_column, text_pair_column = (*task.text_columns, None)[:2]
            num_labels = num_labels or task.num_labels
    columns = {
        split: choose_columns(
            table.column_names, read.where[split], text=text_column, pair=text_pair_column, label=label_column
        )
        for split, table in read.tables.items()
    }
    options = {"num_labels": num_labels, "base_names": base_names, "drop_unlabelled": drop_unlabelled}
    return _to_splits(read, columns, options if use_labels else None, label_names, empty_texts)


def load_file(
    path: str,
    *,
    column_names: Sequence[str] | None = None,
    delimiter: str | None = None,
    quotes: bool | None = None,
    encoding: str | None = None,
    field: str | None = None,
    glob: bool = False,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    use_labels: bool = True,
    empty_texts: EmptyTexts = "keep",
) -> Split:
    """Load the rows of one file for prediction or evaluation. Arguments and errors are as in `load_splits`.

    Labels are read if the file has a column `label` (or `label_column`) that is not all -1. In that case give the
    `label_names` and `num_labels` of the training run, or the ids may mean other classes.
    """
    table = read_file(
        path, column_names=column_names, delimiter=delimiter, quotes=quotes, encoding=encoding, field=field, glob=glob
    )
    columns = choose_columns(table.column_names, path, text=text_column, pair=text_pair_column, label=label_column)
    split = _texts(table, columns, path, empty_texts)
    raw = column_values(table, columns.label) if use_labels and columns.label is not None else []
    if not _all_hidden(raw):
        encoded = encode_labels({path: raw}, num_labels=num_labels, label_names=label_names)
        split = replace(split, labels=encoded.columns[path])
    return without_empty(split, path, empty_texts)[0]


def _from_files(files: Mapping[str, str], name: str | None, reading: Mapping[str, Any]) -> _Tables:
    return _Tables(
        tables={split: read_file(path, **reading) for split, path in files.items()},
        where=files,
        source="files: " + ", ".join(f"{split} {path}" for split, path in files.items()),
        notes=() if name is None else (f"the dataset '{name}' is not read: data.train_file overrides it",),
    )


def _from_hub(name: str, subset: str | None, validation_split: str | None, test_split: str | None) -> _Tables:
    found = read_hub(name, subset=subset)
    # MNLI has two validation and two test splits: matched and mismatched.
    suffix = "_matched" if name == "glue/mnli" else ""
    wanted = {
        "train": "train",
        "validation": validation_split or f"validation{suffix}",
        "test": test_split or f"test{suffix}",
    }
    for flag, split in (("data.name", "train"), ("validation_split", validation_split), ("test_split", test_split)):
        if split is not None and split not in found:
            raise InputError(f"{flag}: the dataset '{name}' has no split '{split}'; splits: {', '.join(found)}")
    present = {split: hub_split for split, hub_split in wanted.items() if hub_split in found}
    return _Tables(
        tables={split: found[hub_split] for split, hub_split in present.items()},
        where={split: f"{name} [{hub_split}]" for split, hub_split in present.items()},
        source=f"hub dataset {name}{f', {subset}' if subset else ''}: " + ", ".join(present.values()),
    )


def _to_splits(
    read: _Tables,
    columns: Mapping[str, Columns],
    options: dict[str, Any] | None,
    label_names: Sequence[str] | None,
    empty_texts: EmptyTexts,
) -> Splits:
    """The splits of `read`. `options` are those of `encode_labels` besides the names; None leaves the labels unread."""
    notes = list(read.notes)
    splits = {
        split: _texts(table, columns[split], read.where[split], empty_texts) for split, table in read.tables.items()
    }
    num_labels, names = None, None
    if options is not None and columns["train"].label is not None:
        raw = _raw_labels(read, columns)
        # GLUE's test labels are not public, so a run on it cannot be tested on them.
        if "test" in splits and ("test" not in raw or _all_hidden(raw["test"])):
            why = "the labels of {} are all -1 or empty (not public)" if "test" in raw else "{} has no label column"
            notes.append(f"{why.format(read.where['test'])}: it is not used")
            del splits["test"]
            raw.pop("test", None)
        declared = class_names(read.tables["train"], columns["train"].label)
        if declared and not label_names and options["num_labels"] != 1:
            raw = {
                split: [declared[v] if v in range(len(declared)) else v for v in values]
                for split, values in raw.items()
            }
        labels = _encode(raw, read.where, label_names or declared, options)
        splits = {
            name: replace(take(split, labels.rows[name]), labels=labels.columns[name]) for name, split in splits.items()
        }
        num_labels, names = labels.num_labels, labels.names
        notes += labels.notes
    # After the labels are read, so that messages about either count the rows of the file.
    for split, rows in splits.items():
        splits[split], note = without_empty(rows, read.where[split], empty_texts)
        notes += [note] if note else []
    # After the labels are read, because labelled and unlabelled rows are held out differently.
    if "validation" not in splits:
        splits["train"], splits["validation"], note = hold_out(splits["train"], read.where["train"])
        notes.append(note)
    return Splits(
        train=splits["train"],
        validation=splits["validation"],
        test=splits.get("test"),
        num_labels=num_labels,
        label_names=names,
        source=read.source,
        notes=tuple(notes),
    )


def _texts(table: Dataset, columns: Columns, where: str, empty: EmptyTexts) -> Split:
    # Rows of None are dropped with those of blank text, after the labels are read.
    allow_none = empty == "drop"
    texts = read_texts(table, columns.text, where, allow_none=allow_none)
    if not any(text and text.strip() for text in texts):
        raise InputError(
            f"{where}: column '{columns.text}' has no text in its {len(texts)} rows; give another data.text_column or file"
        )
    pairs = None if columns.pair is None else read_texts(table, columns.pair, where, allow_none=allow_none)
    return Split(texts, pairs)


def _all_hidden(raw: Sequence[Any]) -> bool:
    """True if every label is -1 or empty, which means that the labels are withheld (as GLUE's test labels are)."""
    return all(value in (WITHHELD, str(WITHHELD), "", None) for value in raw)


def _raw_labels(read: _Tables, columns: Mapping[str, Columns]) -> dict[str, list[Any]]:
    """The labels of each split that has them. Only a test split may have none."""
    raw = {}
    for split, table in read.tables.items():
        label = columns[split].label
        if label is not None:
            raw[split] = column_values(table, label)
        elif split == "validation":
            available = ", ".join(table.column_names)
            raise InputError(f"{read.where[split]} has no label column, but train has one; columns: {available}")
    return raw


def _encode(
    raw: Mapping[str, list[Any]], where: Mapping[str, str], names: Sequence[str] | None, options: dict[str, Any]
) -> Labels:
    """The labels by split. Those of train must be of two classes, unless the names or the number of classes are known."""
    # Two splits may come from one file, so the key for errors also holds the split's name.
    keys = {split: f"{split} ({where[split]})" for split in raw}
    found = encode_labels({keys[split]: values for split, values in raw.items()}, label_names=names, **options)
    check_two_classes(found, keys["train"])
    return replace(
        found,
        columns={split: found.columns[key] for split, key in keys.items()},
        rows={split: found.rows[key] for split, key in keys.items()},
    )
