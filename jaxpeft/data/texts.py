"""Columns of texts: lists or, for large data, columns of a table on disk that are read slice by slice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, overload

import numpy as np

from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_TEXTS_PER_READ = 1024


class TextColumn(Sequence[str]):
    """A column of texts in a table that is mapped into memory. It equals a list of the same texts.

    Texts become Python strings only while they are read: one at a time, or 1024 at a time in a loop. A slice is another
    column and reads nothing; `list` reads everything. A text may also be a list of words.
    """

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __init__(self, table: Dataset, column: str, rows: range | np.ndarray | None = None) -> None:
        """The texts of `column` in the given `rows` of `table`, in that order; None takes all rows. All of them must be text."""
        self._table, self._column = table, column
        self._rows = range(len(table)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> TextColumn: ...
    def __getitem__(self, index: int | slice) -> str | TextColumn:
        if isinstance(index, slice):
            return TextColumn(self._table, self._column, self._rows[index])
        return self._table[int(self._rows[index])][self._column]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _TEXTS_PER_READ):
            rows = self._rows[start : start + _TEXTS_PER_READ]
            # A range becomes a slice, which the table reads without looking for every row.
            found = self._table[slice(rows.start, rows.stop) if _runs_on(rows) else list(rows)]
            yield from found[self._column]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | TextColumn):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"TextColumn('{self._column}', {len(self):,} rows)"


def _runs_on(rows: range | np.ndarray) -> TypeGuard[range]:
    return isinstance(rows, range) and rows.step == 1


def read_texts(table: Dataset, column: str, where: str, *, allow_none: bool = False) -> TextColumn:
    """A text column of `table`. With `allow_none`, rows may have the value None, and must be dropped by the caller.

    Raises InputError on the first row (counted from 1) that is not text.
    """
    table = table.select_columns([column])
    texts = TextColumn(table, column)
    is_text, number_of_none = _kind(table, column)
    if not is_text or (number_of_none and not allow_none):
        for row, value in enumerate(texts):
            if value is None and not allow_none:
                raise InputError(
                    f"{where}, row {row + 1}: column '{column}' has no text (null); fill it in, or set data.drop_empty to true to "
                    "leave such rows out"
                )
            if not isinstance(value, str | None):
                raise InputError(
                    f"{where}, row {row + 1}: column '{column}' holds {value!r}, not text; fix it or drop the row"
                )
    return texts


def _kind(table: Dataset, column: str) -> tuple[bool, int]:
    """Whether the type of the column is text, and the number of values that are None, without reading them."""
    import pyarrow as pa

    values = table.data.column(column)
    return pa.types.is_string(values.type) or pa.types.is_large_string(values.type), values.null_count


def blank_rows(texts: Sequence[str]) -> np.ndarray:
    """The rows with no text, or with nothing but white space: `[n]` int, ascending."""
    return _rows_that(texts, _is_blank)


def none_rows(texts: Sequence[str]) -> np.ndarray:
    """The rows whose value is None: `[n]` int, ascending."""
    return _rows_that(texts, lambda values: values.is_null().to_numpy(zero_copy_only=False))


def _rows_that(texts: Sequence[str], check: Callable[[Any], np.ndarray]) -> np.ndarray:
    """The rows for which `check` is true. It gets pieces of the column, as arrays of pyarrow."""
    import pyarrow as pa

    if not isinstance(texts, TextColumn):
        kind = pa.string() if all(isinstance(text, str | None) for text in texts) else pa.list_(pa.string())
        return np.flatnonzero(check(pa.array(texts, kind)))
    found = [np.zeros(0, bool), *(check(values) for values in texts._table.data.column(texts._column).chunks)]
    rows = texts._rows
    return np.flatnonzero(np.concatenate(found)[slice(rows.start, rows.stop) if _runs_on(rows) else np.asarray(rows)])


def _is_blank(values: Any) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):  # a list is blank if it has no words
        return pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0).to_numpy(zero_copy_only=False)
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return np.asarray([value is None or not value.strip() for value in values.to_pylist()], bool)
    length = pc.binary_length(pc.utf8_trim_whitespace(values))
    return pc.equal(pc.fill_null(length, 0), 0).to_numpy(zero_copy_only=False)


def rows_of(texts: Sequence[str]) -> range | np.ndarray:
    """The rows, from 0, that the texts have in the table that they are read from."""
    return texts._rows if isinstance(texts, TextColumn) else range(len(texts))


def take_texts(texts: Sequence[str], rows: np.ndarray) -> Sequence[str]:
    """The texts of the given `rows`, `[n]` int, in that order. Those of a `TextColumn` are not read."""
    if not isinstance(texts, TextColumn):
        return [texts[row] for row in rows]
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return texts[int(rows[0]) : int(rows[0]) + len(rows)]
    return TextColumn(texts._table, texts._column, np.asarray(texts._rows)[rows])


def hash_texts(texts: Sequence[str]) -> str:
    """SHA-256 of the texts and of their boundaries. It does not depend on the file that holds them."""
    contents, lengths = hashlib.sha256(), hashlib.sha256()
    for start in range(0, len(texts), _TEXTS_PER_READ):
        encoded = [_as_bytes(text) for text in texts[start : start + _TEXTS_PER_READ]]
        contents.update(b"".join(encoded))
        lengths.update(np.asarray([len(text) for text in encoded], "<i8").tobytes())
    return hashlib.sha256(contents.digest() + lengths.digest()).hexdigest()


def _as_bytes(text: str | Sequence[str]) -> bytes:
    """A text, or a list of words with its boundaries."""
    return (text if isinstance(text, str) else json.dumps(text)).encode("utf-8", "surrogatepass")
