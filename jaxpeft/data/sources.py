"""From a dataset's tables to the texts, pairs and labels of its splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from jaxpeft.data.columns import Columns, choose_columns, class_names, column_values
from jaxpeft.data.files import read_file
from jaxpeft.data.glue import GLUE
from jaxpeft.data.label_values import WITHHELD
from jaxpeft.data.labels import Labels, check_two_classes, encode_labels
from jaxpeft.data.python_docs import load_python_docs
from jaxpeft.data.splits import EmptyTexts, Split, Splits, hold_out, take, without_empty
from jaxpeft.data.tables import Tables, read_tables
from jaxpeft.data.texts import read_texts
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

PYTHON_DOCS = "python-docs"
"""The name of the built-in texts."""


@dataclass(frozen=True)
class ReadOptions:
    """How the rows of a table become texts and labels: the flags of the same names in `data`, and what follows from the base.

    Attributes:
      text_column: the column of the text; None takes `text` or a GLUE task's columns.
      text_pair_column: the column of the second text, or None.
      label_column: the column of the label; None takes `label` if there is one.
      label_columns: the columns of 0 and 1, one for each class, instead of a column of lists (multi-label); None: there are none.
      label_delimiter: the text between two classes of a label (multi-label); None finds it.
      label_names: the names of the classes in the order of their ids; None sorts the names found in train.
      num_labels: the number of classes, 1 for regression; None counts those in train.
      base_names: the names of the base's classes in the order of their ids; classes of the same names take its ids.
      drop_unlabelled: leave out rows without a label, instead of refusing them.
      empty_texts: "keep" rows without a text, "refuse" them, or "drop" them, which the notes report.
      negative_column: the column of a text that does not belong to the first, or None.
      needs_every_text: a row counts as empty if any of its texts is.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    label_columns: Sequence[str] | None = None
    label_delimiter: str | None = None
    label_names: Sequence[str] | None = None
    num_labels: int | None = None
    base_names: Sequence[str] | None = None
    drop_unlabelled: bool = False
    empty_texts: EmptyTexts = "keep"
    negative_column: str | None = None
    needs_every_text: bool = False

    def for_dataset(self, name: str | None) -> ReadOptions:
        """The options with the columns and classes of the dataset `name`, if it is one of GLUE and the user named no column."""
        task = GLUE.get((name or "").removeprefix("glue/"))
        if task is None or self.text_column is not None:
            return self
        text, pair = (*task.text_columns, None)[:2]
        return replace(self, text_column=text, text_pair_column=pair, num_labels=self.num_labels or task.num_labels)

    def columns_of(self, table: Dataset, where: str) -> Columns:
        """The columns of `table`, which comes from `where`; see `choose_columns`."""
        return choose_columns(
            table.column_names,
            where,
            text=self.text_column,
            pair=self.text_pair_column,
            label=self.label_column,
            negative=self.negative_column,
        )


Encode = Callable[[Mapping[str, Sequence[Any]], ReadOptions], Labels]
"""`(labels of each split as they are in its column, options) → labels`. The keys name the splits in errors."""


HoldOut = Callable[[Split, str], tuple[Split, Split, str]]
"""`(train, its origin for messages) → (train, validation, a note)`: `jaxpeft.data.splits.hold_out`, or a task's own."""


def load_splits(name: str | None = None, *, use_labels: bool = True, **options: Any) -> Splits:
    """Load the train, validation and test rows of a dataset: from local files if `train_file` is given, else by name.

        load_splits("glue/sst2")
        load_splits(train_file="reviews.csv", text_column="review", label_column="stars")

    Without a validation split, 10 % of train is held out. A test split without labels (GLUE's are all -1) is dropped.
    `notes` of the result reports both.

    Args:
      name: "python-docs", or as in `read_tables`.
      use_labels: False leaves the labels unread, for masked language modelling.
      **options: those of `read_tables`, and the attributes of `ReadOptions`.

    Raises:
      InputError: a file, dataset, split or column does not exist, cannot be reached or read, or has no rows.
    """
    reading, where = _apart(options)
    if name == PYTHON_DOCS and where.get("train_file") is None:
        return load_python_docs()
    return text_splits(read_tables(name, **where), reading, classes_or_numbers if use_labels else None)


def load_file(path: str, **options: Any) -> Split:
    """Load the rows of one file, with their labels if it has a column of them that is not all -1.

    Give the `label_names` and `num_labels` of the training run, or the ids may mean other classes.

    Args:
      path: as in `read_file`.
      **options: those of `read_file`, and the attributes of `ReadOptions`.

    Raises:
      InputError: as `load_splits`.
    """
    reading, of_file = _apart(options)
    table = read_file(path, **of_file)
    columns = reading.columns_of(table, path)
    split = _texts(table, columns, path, reading.empty_texts)
    raw = column_values(table, columns.label) if columns.label is not None else []
    if not _all_hidden(raw):
        encoded = encode_labels({path: raw}, num_labels=reading.num_labels, label_names=reading.label_names)
        split = replace(split, labels=encoded.columns[path])
    return without_empty(split, path, reading.empty_texts)[0]


def _apart(options: Mapping[str, Any]) -> tuple[ReadOptions, dict[str, Any]]:
    """The attributes of `ReadOptions` among `options`, and the rest."""
    own = {field.name for field in fields(ReadOptions)} & options.keys()
    return ReadOptions(**{key: options[key] for key in own}), {key: options[key] for key in options.keys() - own}


def classes_or_numbers(raw: Mapping[str, Sequence[Any]], options: ReadOptions) -> Labels:
    """One class or one number for each row: `encode_labels`. Those of train must be of two classes, unless the classes are known."""
    found = encode_labels(
        raw,
        num_labels=options.num_labels,
        label_names=options.label_names,
        base_names=options.base_names,
        drop_unlabelled=options.drop_unlabelled,
    )
    check_two_classes(found, next(iter(raw)))
    return found


def text_splits(
    read: Tables,
    options: ReadOptions,
    encode: Encode | None = classes_or_numbers,
    hold_out: HoldOut = hold_out,
) -> Splits:
    """The splits of tables with a text in each row, maybe a second one, and maybe a label.

    Args:
      read: the tables.
      options: the flags.
      encode: converts the labels; None leaves them unread.
      hold_out: divides train if there is no validation split.

    Raises:
      InputError: a column does not exist, or a text or label cannot be read.
    """
    options = options.for_dataset(read.name)
    columns = {split: options.columns_of(table, read.where[split]) for split, table in read.tables.items()}
    notes = list(read.notes)
    splits = {
        split: _texts(table, columns[split], read.where[split], options.empty_texts)
        for split, table in read.tables.items()
    }
    num_labels, names = None, None
    if encode is not None and columns["train"].label is not None:
        raw = _raw_labels(read, columns)
        # GLUE's test labels are not public, so a run on it cannot be tested on them.
        if "test" in splits and ("test" not in raw or _all_hidden(raw["test"])):
            why = "the labels of {} are all -1 or empty (not public)" if "test" in raw else "{} has no label column"
            notes.append(f"{why.format(read.where['test'])}: it is not used")
            del splits["test"]
            raw.pop("test", None)
        declared = class_names(read.tables["train"], columns["train"].label)
        if declared and not options.label_names and options.num_labels != 1:
            raw = {split: [_named(value, declared) for value in values] for split, values in raw.items()}
        labels = _encoded(encode, raw, read.where, replace(options, label_names=options.label_names or declared))
        splits = {
            name: replace(take(split, labels.rows[name]), labels=labels.columns[name]) for name, split in splits.items()
        }
        num_labels, names = labels.num_labels, labels.names
        notes += labels.notes
    # After the labels are read, so that messages about either count the rows of the file.
    for split, rows in splits.items():
        splits[split], note = without_empty(
            rows, read.where[split], options.empty_texts, needs_every_text=options.needs_every_text
        )
        notes += [note] if note else []
    return finished_splits(splits, read, notes, num_labels, names, hold_out)


def finished_splits(
    splits: Mapping[str, Split],
    read: Tables,
    notes: Sequence[str],
    num_labels: int | None,
    label_names: tuple[str, ...] | None,
    hold_out: HoldOut = hold_out,
) -> Splits:
    """`Splits` of the rows of each split. Without a validation split, a part of train is held out, which the notes report."""
    train, validation, notes = splits["train"], splits.get("validation"), list(notes)
    if validation is None:
        train, validation, note = hold_out(train, read.where["train"])
        notes.append(note)
    return Splits(train, validation, splits.get("test"), num_labels, label_names, read.source, tuple(notes))


def texts_to_answer(table: Dataset, where: str, options: ReadOptions) -> Split:
    """The texts of a table, and their pairs, without labels. The column of the labels need not exist.

    Raises:
      InputError: as `text_splits`.
    """
    options = replace(options, label_column=None)
    split = _texts(table, options.columns_of(table, where), where, options.empty_texts)
    return without_empty(split, where, options.empty_texts)[0]


def _texts(table: Dataset, columns: Columns, where: str, empty: EmptyTexts) -> Split:
    # Rows of None are dropped with those of blank text, after the labels are read.
    allow_none = empty == "drop"
    texts = read_texts(table, columns.text, where, allow_none=allow_none)
    if not any(text and text.strip() for text in texts):
        raise InputError(
            f"{where}: column '{columns.text}' has no text in its {len(texts)} rows; give another data.text_column or file"
        )
    pairs, negatives = (
        None if column is None else read_texts(table, column, where, allow_none=allow_none)
        for column in (columns.pair, columns.negative)
    )
    return Split(texts, pairs, negatives=negatives)


def _named(value: Any, names: Sequence[str]) -> Any:
    """The name of the class id `value`, or the names of those in a list. Other values stay."""
    if isinstance(value, list):
        return [_named(each, names) for each in value]
    return names[value] if value in range(len(names)) else value


def _all_hidden(raw: Sequence[Any]) -> bool:
    """True if every label is -1 or empty, which means that the labels are withheld (as GLUE's test labels are)."""
    return all(value in (WITHHELD, str(WITHHELD), "", None) for value in raw)


def _raw_labels(read: Tables, columns: Mapping[str, Columns]) -> dict[str, list[Any]]:
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


def _encoded(encode: Encode, raw: Mapping[str, list[Any]], where: Mapping[str, str], options: ReadOptions) -> Labels:
    """The labels by split."""
    # Two splits may come from one file, so the key for errors also holds the split's name.
    keys = {split: f"{split} ({where[split]})" for split in raw}
    found = encode({keys[split]: values for split, values in raw.items()}, options)
    return replace(
        found,
        columns={split: found.columns[key] for split, key in keys.items()},
        rows={split: found.rows[key] for split, key in keys.items()},
    )
