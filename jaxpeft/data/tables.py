"""The tables of a dataset: those of local files, or those of the hub. Their columns have no meaning yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxpeft.data.files import read_file
from jaxpeft.data.hub import KNOWN_NAMES, read_hub
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

ReadFile = Callable[..., "Dataset"]
"""`(path, **options) → table`, with the arguments and errors of `read_file`."""


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of a dataset.

    Attributes:
      tables: split → its table: train, and validation and test if the dataset has them.
      where: split → its file or its place on the hub, for messages.
      source: the origin of all of them, in one line for a reader.
      name: the dataset's name, or None for files.
      notes: one line for each thing that the user did not ask for.
    """

    tables: Mapping[str, Dataset]
    where: Mapping[str, str]
    source: str
    name: str | None = None
    notes: tuple[str, ...] = ()


def read_tables(
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
    validation_split: str | None = None,
    test_split: str | None = None,
    read_file: ReadFile = read_file,
) -> Tables:
    """Read the tables of a dataset: of local files if `train_file` is given, else by its name on the hub.

    Args:
      name: a WikiText config ("wikitext-2-raw-v1"), "glue/TASK", or the id of a hub dataset.
      subset: the config name of a hub dataset that has several.
      train_file: a file; overrides `name`.
      validation_file: the same for validation.
      test_file: the same for test.
      column_names: as in `read_file`, and so are the next five.
      delimiter: the character between fields.
      quotes: whether fields may stand in double quotes.
      encoding: the encoding of files of text.
      field: the key of the rows in a .json file.
      glob: True if `train_file` and the others are patterns of several files.
      validation_split: the hub's name of the split to validate on; None is "validation" (MNLI: "validation_matched").
      test_split: the hub's name of the split to test on; None is "test".
      read_file: reads one file.

    Raises:
      InputError: a file, dataset or split does not exist, cannot be reached or read, or has no rows.
    """
    if train_file is None and (validation_file or test_file):
        raise InputError(f"{validation_file or test_file} is given without data.train_file; give it, or neither")
    if train_file is None and name is None:
        raise InputError(
            f"no dataset: set data.name (such as {', '.join(KNOWN_NAMES[:2])} or glue/sst2) or data.train_file"
        )
    if train_file is None:
        return _from_hub(str(name), subset, validation_split, test_split)
    files = {"train": train_file, "validation": validation_file, "test": test_file}
    reading = {
        "column_names": column_names,
        "delimiter": delimiter,
        "quotes": quotes,
        "encoding": encoding,
        "field": field,
        "glob": glob,
    }
    return _from_files({split: path for split, path in files.items() if path}, name, reading, read_file)


def _from_files(files: Mapping[str, str], name: str | None, reading: Mapping[str, Any], read: ReadFile) -> Tables:
    return Tables(
        tables={split: read(path, **reading) for split, path in files.items()},
        where=files,
        source="files: " + ", ".join(f"{split} {path}" for split, path in files.items()),
        notes=() if name is None else (f"the dataset '{name}' is not read: data.train_file overrides it",),
    )


def _from_hub(name: str, subset: str | None, validation_split: str | None, test_split: str | None) -> Tables:
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
    return Tables(
        tables={split: found[hub_split] for split, hub_split in present.items()},
        where={split: f"{name} [{hub_split}]" for split, hub_split in present.items()},
        source=f"hub dataset {name}{f', {subset}' if subset else ''}: " + ", ".join(present.values()),
        name=name,
    )
