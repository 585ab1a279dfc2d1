"""Turn every form of a JSON file into lines of JSON in UTF-8, which `datasets` reads in constant memory."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

from jaxpeft.errors import InputError, did_you_mean


def as_json_lines(path: str, encoding: str, folder: str, field: str | None) -> str:
    """The path of a file with one JSON object per line and the rows of `path`: itself, or a copy in `folder`.

    A .json file that is one list, or one object with the rows under the key `field`, is read into memory as a whole.

    Raises:
      InputError: the file is not JSON, `field` is not in it, or its rows are neither objects nor texts.
    """
    copy = os.path.join(folder, "rows.jsonl")
    if not path.lower().endswith(".json") or (field is None and _has_lines(path, encoding)):
        if field is not None:
            raise InputError(
                f"data.field '{field}' is for .json files that are one object, but {path} has one per line; leave it out"
            )
        if encoding == "utf-8":
            return path
        with open(path, encoding=encoding) as text, open(copy, "w", encoding="utf-8") as lines:
            shutil.copyfileobj(text, lines)
        return copy
    try:
        with open(path, encoding=encoding) as text:
            document = json.load(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}; repair that line") from error
    with open(copy, "w", encoding="utf-8") as lines:
        for row, value in enumerate(_rows(path, document, field), 1):
            if not isinstance(value, dict | str):
                raise InputError(f"{path}, row {row}: {str(value)[:40]} is not an object with a key for each column")
            lines.write(json.dumps(value if isinstance(value, dict) else {"text": value}) + "\n")
    return copy


def first_bad_line(path: str) -> tuple[int, str] | None:
    """The number and the problem of the first line of a UTF-8 file that is not JSON; None if all are."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    json.loads(line)
            except json.JSONDecodeError as error:
                return number, error.msg
    return None


def _has_lines(path: str, encoding: str) -> bool:
    """True if the first two lines with text are an object each, or the only one is an object without a list of rows in it."""
    with open(path, encoding=encoding) as text:
        filled = (line for line in text if line.strip())
        first, second = next(filled, ""), next(filled, None)
    try:
        value = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and (second is not None or not _lists_of_rows(value))


def _lists_of_rows(document: dict[str, Any]) -> list[str]:
    return [key for key, value in document.items() if isinstance(value, list) and value and isinstance(value[0], dict)]


def _rows(path: str, document: Any, field: str | None) -> list[Any]:
    found = document
    for key in [] if field is None else [field] if isinstance(found, dict) and field in found else field.split("."):
        if not isinstance(found, dict) or key not in found:
            keys = list(found) if isinstance(found, dict) else []
            known = (
                f"{did_you_mean(key, keys)}; keys: {', '.join(keys)}" if keys else "; the file is a list: leave it out"
            )
            raise InputError(f"data.field '{field}': {path} has no such key{known}")
        found = found[key]
    if isinstance(found, list):
        return found
    if field is not None:
        raise InputError(f"data.field '{field}': {path} has no list of rows there")
    keys = _lists_of_rows(document) if isinstance(document, dict) else []
    if keys:
        raise InputError(f"{path} is one object, with rows under {' and '.join(keys)}; give data.field {keys[0]}")
    raise InputError(f"{path} is one value, not a list of rows; give data.field if the rows are inside it")
