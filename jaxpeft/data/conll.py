"""Read CoNLL files: a word per line with its tags in columns, and a blank line between sentences."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpeft.data.files import FORMATS, as_table, check_options, format_of, read_each, read_file
from jaxpeft.data.text_files import encoding_of
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_CONLL_U = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
"""The columns of CoNLL-U, which always has ten."""
_SUFFIXES = (".conll", ".bio", ".iob", ".conllu", ".txt")
_FORMATS = {**FORMATS, **dict.fromkeys(_SUFFIXES, "conll")}


def read_tagged_file(
    path: str,
    *,
    column_names: Sequence[str] | None = None,
    delimiter: str | None = None,
    quotes: bool | None = None,
    encoding: str | None = None,
    field: str | None = None,
    glob: bool = False,
) -> Dataset:
    """Read a file of tagged sentences: a CoNLL file (.conll, .bio, .iob, .conllu or .txt), or any format of `read_file`.

    In a CoNLL file, columns are separated by blanks or, in lines that have one, by tabs. Every column becomes a column of lists with
    an entry for each word. Without `column_names` the first one is called `tokens`, the last one `tags`, and those between
    `column_2`, `column_3` and so on; those of .conllu have the names of CoNLL-U (`form`, `upos`, …). These lines are no words:

    - a line that begins with `-DOCSTART-`;
    - in .conllu a line that begins with `#`, and one of several words or of none (`3-4`, `5.1`);
    - in the other files a line that begins with `#`, unless it has as many columns as the others and ends as one of them does.

    Args and errors are those of `read_file`. A line with another number of columns is an error.
    """
    given = {
        "column_names": column_names,
        "delimiter": delimiter,
        "quotes": quotes,
        "encoding": encoding,
        "field": field,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}

    def read_one(found: str) -> Dataset:
        return _read_conll(found, options) if format_of(found, _FORMATS) == "conll" else read_file(found, **options)

    return read_each(path, read_one, glob=glob)


def _read_conll(path: str, options: dict[str, Any]) -> Dataset:
    check_options(path, "conll", options)
    file = _Conll(path, encoding_of(path, options.get("encoding")), Path(path).suffix.lower() == ".conllu")
    names = file.names(options.get("column_names"))
    with tempfile.TemporaryDirectory() as folder:
        table = as_table(names, file.sentences(len(names)), folder, lists=True)
    if not len(table):
        raise InputError(f"{path} has no words; give a file with at least one sentence")
    return table


@dataclass(frozen=True)
class _Conll:
    path: str
    encoding: str
    is_conllu: bool

    def names(self, given: Sequence[str] | None) -> list[str]:
        """The names of the columns: the `given` ones, or those of `read_tagged_file`."""
        line, number = next(((line, len(fields)) for line, fields in self._lines() if fields), (0, 0))
        if self.is_conllu and given is None:
            given = _CONLL_U
        if number and given is not None and len(given) != number:
            whose = "CoNLL-U has" if given is _CONLL_U else "data.column_names has"
            raise InputError(
                f"{self.path}, line {line}: {number} columns, and {whose} {len(given)}; make the two agree"
            )
        if given is not None:
            return list(given)
        return ["tokens", *(f"column_{i}" for i in range(2, number)), "tags"][: max(number, 1)]

    def sentences(self, number: int) -> Iterator[list[list[str]]]:
        """The sentences: the words of each column, for `number` columns."""
        columns: list[list[str]] = [[] for _ in range(number)]
        for line, fields in self._lines():
            if fields and len(fields) != number:
                raise InputError(
                    f"{self.path}, line {line}: {len(fields)} column{'s' if len(fields) > 1 else ''}, and the other lines have "
                    f"{number}; repair it"
                )
            for column, value in zip(columns, fields, strict=False):
                column.append(value)
            if not fields and columns[0]:
                yield columns
                columns = [[] for _ in range(number)]
        if columns[0]:
            yield columns

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """The number of each line, from 1, and its fields; none for a line that ends a sentence. Comments are left out."""
        number, endings = self._usual()
        for line, text in self._text():
            fields = _fields(text)
            if not fields or text.startswith("-DOCSTART-"):
                yield line, []
            elif text.startswith("#") and (self.is_conllu or len(fields) != number or fields[-1] not in endings):
                continue
            elif not (self.is_conllu and re.fullmatch(r"\d+[-.]\d+", fields[0])):
                yield line, fields

    def _usual(self) -> tuple[int, set[str]]:
        """The number of columns, and the last fields, of the lines that surely are words."""
        number, endings = 0, set()
        if not self.is_conllu:
            for _, text in self._text():
                if not text.startswith(("#", "-DOCSTART-")) and (fields := _fields(text)):
                    number = number or len(fields)
                    endings.add(fields[-1])
        return number, endings

    def _text(self) -> Iterator[tuple[int, str]]:
        with open(self.path, encoding=self.encoding) as lines:
            for number, line in enumerate(lines, 1):
                yield number, line.rstrip("\n")


def _fields(line: str) -> list[str]:
    """The columns of a line. Only blanks and tabs separate: other white space may be a word."""
    line = line.rstrip(" \t")
    if not line.strip():
        return []
    return [field.strip(" ") for field in line.split("\t")] if "\t" in line else re.findall("[^ ]+", line)
