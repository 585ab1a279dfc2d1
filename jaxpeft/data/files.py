"""Read local files into tables of the `datasets` library, which are temporary files that are mapped into memory."""

from __future__ import annotations

import glob as patterns
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpeft.data.delimited import open_delimited
from jaxpeft.data.json_files import as_json_lines, first_bad_line
from jaxpeft.data.text_files import encoding_of
from jaxpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
"""Suffix → format."""
_OPTIONS = {  # option → the formats that have it, and their suffixes in words
    "column_names": (("csv", "conll"), ".csv, .tsv and CoNLL files"),
    "delimiter": (("csv",), ".csv and .tsv files"),
    "quotes": (("csv",), ".csv and .tsv files"),
    "encoding": (("csv", "text", "json", "conll"), "files of text"),
    "field": (("json",), ".json files"),
}
_ROWS_PER_BATCH, _LETTERS_PER_BATCH = 10_000, 10_000_000


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Hide the progress bars and log lines of `datasets` and `huggingface_hub`. Our errors say what matters."""
    import datasets
    import huggingface_hub.utils as hub_utils

    bars, hub_bars = not datasets.are_progress_bars_disabled(), not hub_utils.are_progress_bars_disabled()
    level, hub_level = datasets.logging.get_verbosity(), hub_utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    hub_utils.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub_utils.logging.set_verbosity(hub_utils.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # A reader of datasets 5.0 may leave its file open; delete this filter when none does.
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        datasets.logging.set_verbosity(level)
        hub_utils.logging.set_verbosity(hub_level)
        if bars:
            datasets.enable_progress_bars()
        if hub_bars:
            hub_utils.enable_progress_bars()


def read_file(
    path: str,
    *,
    column_names: Sequence[str] | None = None,
    delimiter: str | None = None,
    quotes: bool | None = None,
    encoding: str | None = None,
    field: str | None = None,
    glob: bool = False,
) -> Dataset:
    """Read a local file, or several, as a table: a temporary file that is mapped into memory.

    A .txt file gives one column, `text`, with one row per line. Every column of .csv and .tsv is read as text: the
    sentence "NA" stays text, and the kind of a label depends on all of its rows. Columns without a name (an index that pandas
    wrote, or the end of lines with a trailing delimiter) are left out.

    Args:
      path: a .txt, .csv, .tsv, .json, .jsonl or .parquet file. Every character means itself, except "~" at the start, which is
        the home directory.
      column_names: the columns of a .csv or .tsv file without a header line. A first line that repeats the names is
        taken as the header.
      delimiter: the character between the fields of a .csv or .tsv file, or "tab"; None finds it.
      quotes: True if fields of a .csv or .tsv file may stand in double quotes, False if quotes are part of the text; None finds it.
      encoding: the encoding of a file of text; None is UTF-8, or what a byte order mark says.
      field: the key of the rows in a .json file that is one object. A dot leads to a key inside, as in "data.rows".
      glob: True if `path` is a pattern of several files (`*`, `?`, `[...]`, and `**` for folders). They are read in the order of
        their names, and must have the same columns.

    Raises:
      InputError: the file does not exist, has another suffix, does not parse, or has no rows; or an option does not fit it.
    """
    given = {
        "column_names": column_names,
        "delimiter": delimiter,
        "quotes": quotes,
        "encoding": encoding,
        "field": field,
    }
    options = {name: value for name, value in given.items() if value is not None}
    return read_each(path, lambda found: _read_one(found, options), glob=glob)


def read_each(path: str, read_one: Callable[[str], Dataset], *, glob: bool) -> Dataset:
    """The table that `read_one` makes of the file at `path` or, with `glob`, those of all files that match it, joined.

    Raises:
      InputError: no file matches, or the files do not have the same columns.
    """
    path = os.path.expanduser(path)  # pathlib's raises an error for a name that begins with "~" and is no user's
    if not glob:
        return read_one(path)
    paths = matching_files(path)
    return joined(paths, [read_one(found) for found in paths])


def matching_files(pattern: str) -> list[str]:
    """The files that match `pattern`, in the order of their names. Raises InputError if there are none."""
    paths = sorted(
        found for found in patterns.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(found)
    )
    if not paths:
        raise InputError(
            f"no file matches the pattern {pattern}; check it, or set data.glob to false if it is one file's name"
        )
    return paths


def _read_one(path: str, options: dict[str, Any]) -> Dataset:
    format_name = format_of(path)
    check_options(path, format_name, options)
    encoding = encoding_of(path, options.get("encoding")) if format_name != "parquet" else ""
    dialect = {name: value for name, value in options.items() if name in ("column_names", "delimiter", "quotes")}
    # A temporary folder: the shared cache of datasets would keep a copy of every private file ever read. The table stays mapped
    # after its file is deleted, so that a large file never stands in memory as a whole.
    with tempfile.TemporaryDirectory() as folder:
        if format_name == "text":
            with open(path, encoding=encoding) as lines:
                table = as_table(["text"], ([line.rstrip("\n")] for line in lines), folder)
        elif format_name == "csv":
            file = open_delimited(path, encoding, **dialect)
            names = [file.names[i] for i in file.columns]
            if not names:
                raise InputError(f"{path}, line 1: no column has a name; give data.column_names")
            table = as_table(names, file.rows(), folder)
        elif format_name == "json":
            table = _load("json", path, as_json_lines(path, encoding, folder, options.get("field")), folder)
        else:
            table = _load(format_name, path, path, folder)
    if not len(table):
        raise InputError(f"{path} has no rows; give a file with at least one")
    return table


def check_options(path: str, format_name: str, options: Iterable[str]) -> None:
    """Raise InputError if one of the `options`, by name, is not for files of this format."""
    for name in options:
        formats, in_words = _OPTIONS[name]
        if format_name not in formats:
            raise InputError(f"data.{name} is for {in_words}, but {path} is not one; leave it out")


def format_of(path: str, formats: Mapping[str, str] = FORMATS) -> str:
    """The format of the file at `path`, by its suffix.

    Raises:
      InputError: the suffix is not in `formats`, there is no such file, or it is empty.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in formats:
        raise InputError(
            f"{path}: the suffix '{suffix}' is not one of {', '.join(formats)}{did_you_mean(suffix, formats)}"
        )
    if not Path(path).is_file():
        folder = Path(path).parent
        siblings = [str(folder / other.name) for other in folder.iterdir()] if folder.is_dir() else []
        raise InputError(f"no file {path}{did_you_mean(path, siblings) or '; check the path'}")
    if not Path(path).stat().st_size:
        raise InputError(f"{path} is empty (0 bytes); give a file with at least one row")
    return formats[suffix]


def as_table(names: Sequence[str], rows: Iterable[Sequence[Any]], folder: str, *, lists: bool = False) -> Dataset:
    """A table of texts or, with `lists`, of lists of texts, written to a file in `folder` a few rows at a time, and mapped into memory."""
    import pyarrow as pa
    from datasets import Dataset

    path = os.path.join(folder, "rows.arrow")
    kind = pa.list_(pa.string()) if lists else pa.string()
    schema = pa.schema([(name, kind) for name in names])
    with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for columns in _batches(rows, len(names)):
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return Dataset.from_file(path)


def _batches(rows: Iterable[Sequence[Any]], number: int) -> Iterator[list[list[Any]]]:
    """The rows as columns, with a limited number of rows, and of letters or words, in each batch."""
    columns: list[list[Any]] = [[] for _ in range(number)]
    letters = 0
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
            letters += len(value)
        if len(columns[0]) == _ROWS_PER_BATCH or letters > _LETTERS_PER_BATCH:
            yield columns
            columns, letters = [[] for _ in range(number)], 0
    if columns[0]:
        yield columns


def _load(format_name: str, path: str, readable: str, folder: str) -> Dataset:
    """Read `readable`, which is `path` or a copy of it, with `datasets`."""
    import datasets
    from datasets.data_files import DataFilesList

    # datasets takes a name as a pattern and "::" as a step into an archive, so it gets a name that has neither, and no pattern.
    link = os.path.join(folder, f"rows{Path(readable).suffix}")
    if readable != link:
        os.symlink(os.path.abspath(readable), link)
    files = DataFilesList([link], [(link,)])
    options = {"parse_agent_traces": False} if format_name == "json" else {}
    with quiet_datasets():
        try:
            return datasets.load_dataset(
                format_name, data_files={"train": files}, split="train", cache_dir=folder, **options
            )
        except ValueError as error:
            if "corresponds to no data" in str(error):  # datasets' message for a file without rows
                raise InputError(f"{path} has no rows; give a file with at least one") from error
            raise InputError(_unreadable(path, error)) from error
        except (datasets.exceptions.DatasetsError, OSError) as error:  # the cause is the parser's own message
            if format_name == "json" and (found := first_bad_line(readable)):
                raise InputError(f"{path}, line {found[0]}: not JSON: {found[1]}; repair that line") from error
            raise InputError(_unreadable(path, error.__cause__ or error)) from error


def joined(paths: Sequence[str], tables: Sequence[Dataset]) -> Dataset:
    """The rows of all `tables`, which come from `paths`. Raises InputError if their columns differ."""
    import datasets

    for path, table in zip(paths, tables, strict=True):
        if table.column_names != tables[0].column_names:
            columns = [", ".join(columns) for columns in (table.column_names, tables[0].column_names)]
            raise InputError(
                f"{path} has the columns {columns[0]}, but {paths[0]} has {columns[1]}; make them the same"
            )
    try:
        return datasets.concatenate_datasets(list(tables))
    except ValueError as error:  # a column of numbers in one file and of text in another
        raise InputError(f"{paths[0]} and the other files of the pattern do not fit together: {error}") from error


def _unreadable(path: str, cause: BaseException) -> str:
    reason = " ".join(str(cause).split())
    return f"{path} cannot be read as {Path(path).suffix}: {reason}; repair the file or convert it"
