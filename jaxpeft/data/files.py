"""Read local files into tables with the `datasets` library."""

from __future__ import annotations

import csv
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpeft.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
_ENCODING = "utf-8-sig"  # UTF-8 with or without a byte order mark, which spreadsheets write


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
            # The csv reader of datasets 5.0 never closes its file; delete this filter when it does.
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        datasets.logging.set_verbosity(level)
        hub_utils.logging.set_verbosity(hub_level)
        if bars:
            datasets.enable_progress_bars()
        if hub_bars:
            hub_utils.enable_progress_bars()


def read_file(path: str, *, column_names: Sequence[str] | None = None) -> Dataset:
    """Read a local file as a table, which is a temporary file that is mapped into memory.

    A .txt file gives one column, `text`, with one row per line. Every column of .csv and .tsv is read as text: the
    sentence "NA" stays text, and the kind of a label depends on all of its rows. A .tsv file is read without quoting,
    because SST-2 has stray quotes.

    Args:
      path: a .txt, .csv, .tsv, .json, .jsonl or .parquet file.
      column_names: the columns of a .csv or .tsv file without a header line. A first line that repeats the names is
        taken as the header.

    Raises:
      InputError: the file does not exist, has another suffix, does not parse, or has no rows.
    """
    format_name = _format_of(path)
    if column_names is not None and format_name != "csv":
        raise InputError(
            f"column_names is for .csv and .tsv files without a header, but {path} is neither; leave it out"
        )
    options = _csv_options(path, column_names) if format_name == "csv" else {}
    table = _load(format_name, path, options)
    if not len(table):
        raise InputError(f"{path} has no rows; give a file with at least one")
    return table


def _format_of(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise InputError(
            f"{path}: the suffix '{suffix}' is not one of {', '.join(_FORMATS)}{did_you_mean(suffix, _FORMATS)}"
        )
    if not Path(path).is_file():
        folder = Path(path).parent
        siblings = [str(folder / other.name) for other in folder.iterdir()] if folder.is_dir() else []
        raise InputError(f"no file {path}{did_you_mean(path, siblings) or '; check the path'}")
    if not Path(path).stat().st_size:
        raise InputError(f"{path} is empty (0 bytes); give a file with at least one row")
    return _FORMATS[suffix]


def _load(format_name: str, path: str, options: dict[str, Any]) -> Dataset:
    import datasets

    # A temporary cache: the shared one would keep a copy of every private file ever read. Its table stays mapped after it is
    # deleted, so that a large file never stands in memory as a whole.
    with quiet_datasets(), tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset(format_name, data_files=path, split="train", cache_dir=cache, **options)
        except ValueError as error:
            if "corresponds to no data" in str(error):  # datasets' message for a file without rows
                raise InputError(f"{path} has no rows; give a file with at least one") from error
            raise InputError(_unreadable(path, error)) from error
        except (datasets.exceptions.DatasetsError, OSError) as error:  # the cause is the parser's own message
            raise InputError(_unreadable(path, error.__cause__ or error)) from error


def _unreadable(path: str, cause: BaseException) -> str:
    reason = " ".join(str(cause).split())
    return f"{path} cannot be read as {Path(path).suffix}: {reason}; repair that line or convert the file"


def _csv_options(path: str, column_names: Sequence[str] | None) -> dict[str, Any]:
    from datasets import Features, Value

    is_tsv = Path(path).suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {
        "delimiter": "\t" if is_tsv else ",",
        "quoting": csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL,
    }
    names, first = _first_rows(path, column_names, dialect)
    if column_names is not None and first == names:
        # The same names are given for all files of a run, but only SST-2's dev.tsv has a header, not train-sentences.tsv.
        return _csv_options(path, None)
    if len(set(names)) < len(names):
        raise InputError(f"{path}: a column name occurs twice in {', '.join(names)}; rename one")
    # pandas would read the surplus fields as an index and shift every column.
    if first is not None and len(first) != len(names):
        hint = "give column_names if the file has no header, or quote fields that hold the delimiter"
        raise InputError(f"{path}: {len(names)} columns ({', '.join(names)}) but {len(first)} fields in row 1; {hint}")
    # pandas would read the sentence "NA" as a missing value (keep_default_na) and guess column types (features).
    options = {**dialect, "keep_default_na": False, "encoding": _ENCODING}
    options["features"] = Features({name: Value("string") for name in names})
    return {**options, "column_names": list(names)} if column_names is not None else options


def _first_rows(
    path: str, column_names: Sequence[str] | None, dialect: dict[str, Any]
) -> tuple[list[str], list[str] | None]:
    """The column names, and the fields of the first row (None if there is no row)."""
    try:
        with open(path, encoding=_ENCODING, newline="") as file:
            rows = (row for row in csv.reader(file, **dialect) if row)  # pandas also skips blank lines
            names = list(column_names) if column_names is not None else next(rows, [])
            return names, next(rows, None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(_unreadable(path, error)) from error
