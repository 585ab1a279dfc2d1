"""Read delimited files (.csv, .tsv): find the delimiter and the quoting, and number the lines of every mistake.

The standard library's `csv` in its strict form reads the rows. It knows the line of each row, which pandas does not tell.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from jaxpeft.errors import InputError

DELIMITERS = (",", ";", "\t", "|")
_SAMPLE_ROWS = 100
_LONGEST_FIELD = 1 << 24  # characters: a longer field is a quote that nobody closed
_MOST_CATEGORIES = 100


@dataclass(frozen=True)
class Delimited:
    """A delimited file and how it is read.

    Attributes:
      path: the file.
      encoding: its codec.
      delimiter: the character between fields.
      quotes: True if a field in double quotes may hold the delimiter and line breaks; False if quotes are part of the text.
      names: the columns; an empty name is a column without one, which is not read.
      has_header: True if the first row holds the names.
      is_sure: True if the user said how quotes are read, so that nothing about them is doubted.
    """

    path: str
    encoding: str
    delimiter: str
    quotes: bool
    names: tuple[str, ...] = ()
    has_header: bool = True
    is_sure: bool = False

    @property
    def columns(self) -> list[int]:
        """The positions of the columns that have a name."""
        return [i for i, name in enumerate(self.names) if name]

    def fits(self, fields: Sequence[str]) -> bool:
        """True if `fields` are a row: a value for every named column, and nothing behind the last column."""
        return len(fields) > max(self.columns, default=-1) and not any(fields[len(self.names) :])

    def rows(self) -> Iterator[list[str]]:
        """The values of the named columns, row by row.

        Raises:
          InputError: a row has too many or too few fields, or a quote is not closed at the end of a field. The message has the line.
        """
        columns, inside = self.columns, _RowsInside(self)
        for line, lines, fields in islice(_parse(self), int(self.has_header), None):
            if not self.fits(fields):
                raise InputError(self._misfit(line, fields))
            if self.quotes and not self.is_sure:
                inside.note(line, lines, fields)
            yield [fields[i] for i in columns]
        inside.check()

    def _misfit(self, line: int, fields: Sequence[str]) -> str:
        count, number = f"{len(fields)} field{'s' if len(fields) != 1 else ''}", len(self.columns)
        names = ", ".join(name for name in self.names if name)
        if len(fields) > number:
            quoting = "" if self.quotes else " and set data.quotes to true"
            hint = f"put quotes around a text that holds {_in_words(self.delimiter)}{quoting}"
            hint += ", or give data.column_names if there is no header" if self.has_header else ""
        else:
            hint = "put quotes around a text with line breaks, or repair the line"
        return f"{self.path}, line {line}: {number} column{'s' if number != 1 else ''} ({names}) but {count}; {hint}"


def open_delimited(
    path: str,
    encoding: str,
    *,
    column_names: Sequence[str] | None = None,
    delimiter: str | None = None,
    quotes: bool | None = None,
) -> Delimited:
    """Find how a delimited file is to be read.

    Args:
      path: the file. The suffix .tsv stands for tabs, and .csv for commas, unless the rows say something else.
      encoding: its codec.
      column_names: the columns of a file without a header line. A first line that repeats the names is a header.
      delimiter: one character, or "tab"; None finds it.
      quotes: as in `Delimited`; None finds it: quotes are read as such, in a file with tabs only if a program has written them.

    Raises:
      InputError: the delimiter is not one character or cannot be found, or two columns have one name.
    """
    # The limit of a field is one number for the whole process, and 131,072 characters is less than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    delimiter = delimiter_of(delimiter) if delimiter is not None else None
    names = None if column_names is None else tuple(column_names)
    file = Delimited(path, encoding, delimiter or ",", quotes is not False, is_sure=quotes is not None)
    if delimiter is None:
        file = replace(file, delimiter=_find_delimiter(file, names, "\t" if path.lower().endswith(".tsv") else ","))
    file = _with_names(file, names)
    if quotes is None and file.delimiter == "\t":
        file = replace(file, quotes=_has_quotes(file))
    return file


def delimiter_of(text: str) -> str:
    r"""The delimiter that a user wrote as one character, or as "tab" or "\t". Raises InputError if it is neither."""
    found = "\t" if text in ("tab", "\\t") else text
    if len(found) != 1 or found in '"\r\n':
        raise InputError(f"data.delimiter is {text!r}; it must be one character, or tab")
    return found


def _with_names(file: Delimited, given: tuple[str, ...] | None) -> Delimited:
    first = next((fields for _, _, fields in _parse(file)), None)
    if first is None:
        raise InputError(f"{file.path} has no rows; give a file with at least one")
    found = tuple(name.strip() for name in first)
    names = found if given is None else given
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise InputError(f"{file.path}: a column name occurs twice in {', '.join(names)}; rename one")
    # The same names are given for all files of a run, but only SST-2's dev.tsv has a header, not train-sentences.tsv.
    return replace(file, names=names, has_header=given is None or found == given)


def _parse(file: Delimited) -> Iterator[tuple[int, list[str], list[str]]]:
    """(number of its first line from 1, its lines, its fields) of every row that is not blank."""
    line, lines = 1, list[str]()
    with open(file.path, encoding=file.encoding, newline="") as text:
        reader = csv.reader(
            _noting(text, lines),
            delimiter=file.delimiter,
            quoting=csv.QUOTE_MINIMAL if file.quotes else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            for fields in reader:
                if fields:
                    yield line, lines, fields
                line += len(lines)
                lines.clear()
        except csv.Error as error:
            raise InputError(f"{file.path}, line {line}: {_stray(len(lines) - 1)}") from error


def _noting(text: Iterator[str], lines: list[str]) -> Iterator[str]:
    for line in text:
        lines.append(line)
        yield line


def _stray(number: int) -> str:
    reach = f" and takes in the next {number} lines" if number > 1 else ""
    return f"a quote (\") opens a field here and is not closed at a field's end{reach}; {_WAY_OUT}"


_WAY_OUT = "repair the line, or set data.quotes to false if quotes are part of the text"


def _plain_fields(file: Delimited, line: str) -> list[str]:
    """The fields of a line whose quotes are part of the text."""
    return next(csv.reader([line], delimiter=file.delimiter, quoting=csv.QUOTE_NONE), [])


class _RowsInside:
    """Finds a stray quote that takes in whole rows and happens to be closed at the end of a field.

    A text with line breaks looks the same, unless each of its lines would be a row by itself, with values that other rows have
    too. So the values of columns with few different values (labels) are noted, and such texts are compared with them at the end.
    """

    def __init__(self, file: Delimited) -> None:
        self._file = file
        self._known: list[set[str]] = [set() for _ in file.names]
        self._rows = 0
        self._doubtful: list[tuple[int, int, list[set[str]]]] = []

    def note(self, line: int, lines: Sequence[str], fields: Sequence[str]) -> None:
        """Note a row: the number of its first line, its lines, and its fields."""
        if len(lines) == 1:
            self._rows += 1
            _note(self._known, fields)
            return
        rows = [_plain_fields(self._file, row) for row in lines]
        if all(row and self._file.fits(row) for row in rows):
            values: list[set[str]] = [set() for _ in self._file.names]
            for row in rows:
                _note(values, row)
            self._doubtful.append((line, len(lines), values))

    def check(self) -> None:
        """Raise InputError for the first text that looks like rows."""
        most = min(_MOST_CATEGORIES, self._rows // 2)
        labels = [i for i, known in enumerate(self._known) if known and len(known) <= most]
        for line, number, values in self._doubtful:
            if labels and all(values[i] <= self._known[i] for i in labels):
                raise InputError(
                    f'{self._file.path}, line {line}: a quote (") opens a field here and takes in {number} lines that look like rows; '
                    "repair the line, or set data.quotes to true if it is one text, or to false if quotes are part of the text"
                )


def _note(sets: Sequence[set[str]], fields: Sequence[str]) -> None:
    for values, value in zip(sets, fields, strict=False):
        if len(values) <= _MOST_CATEGORIES:
            values.add(value)


def _has_quotes(file: Delimited) -> bool:
    """Whether a file with tabs is written with quotes, as pandas and spreadsheets do, or has quotes in its texts, as SST-2 may.

    It is written with quotes if it can be read with them from end to end, and a quoted field needs its quotes: it holds a tab, a
    line break or a doubled quote, or it is a column's name.

    Raises:
      InputError: some fields need their quotes, but the file cannot be read with them.
    """
    file, needed = replace(file, quotes=True), False
    try:
        for row, (line, lines, fields) in enumerate(_parse(file)):
            if '"' not in "".join(lines):
                continue
            plain = [_plain_fields(file, text) for text in lines]
            if len(lines) > 1 and len(file.names) > 1 and all(part and file.fits(part) for part in plain):
                raise InputError(f"{file.path}, line {line}: {_stray(len(lines) - 1)}")
            if not file.fits(fields):
                raise InputError(file._misfit(line, fields))
            is_name = row == 0 and file.has_header and plain[0] != fields
            needed |= is_name or len(lines) > 1 or len(plain[0]) != len(fields) or any(map(_is_doubled, plain[0]))
    except InputError:
        if needed:
            raise
        return False
    return needed


def _is_doubled(field: str) -> bool:
    """True for the text of a quoted field with a doubled quote in it, such as `"a ""b"" c"`."""
    return len(field) > 2 and field[0] == field[-1] == '"' and '""' in field[1:-1]


def _find_delimiter(file: Delimited, names: tuple[str, ...] | None, own: str) -> str:
    """The delimiter by which the first rows have as many fields as the first one or as `names`; `own` if it is as good as any."""
    splitting, regular = [], []
    for delimiter in DELIMITERS:
        rows = _sample(replace(file, delimiter=delimiter, quotes=file.quotes and (file.is_sure or delimiter != "\t")))
        columns = replace(file, names=names or tuple(rows[0]))
        if len(columns.names) > 1 and len(rows[0]) > 1:
            splitting.append(delimiter)
            regular += [delimiter] if all(columns.fits(row) for row in rows) else []
    if own in regular or (own in splitting and not regular):
        return own
    if len(regular) > 1:
        raise InputError(
            f"{file.path}: fields could end at {' or at '.join(map(_in_words, regular))}; give one of them as data.delimiter"
        )
    # If no row fits by the only delimiter that the first row has, the message about that row says more than one about commas.
    only = regular or splitting
    return only[0] if len(only) == 1 else own


def _sample(file: Delimited) -> list[list[str]]:
    """The fields of the first rows; no fields stand for a row that cannot be read, or for a file without rows."""
    rows = []
    try:
        for _, _, fields in islice(_parse(file), _SAMPLE_ROWS):
            rows.append(fields)
    except InputError:
        rows.append([])
    return rows or [[]]


def _in_words(delimiter: str) -> str:
    return "a tab" if delimiter == "\t" else f"'{delimiter}'"
