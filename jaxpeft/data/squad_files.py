"""Read the files of SQuAD (Rajpurkar et al. 2016 and 2018): a JSON document of articles, paragraphs and questions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from jaxpeft.data.files import joined, matching_files, read_file
from jaxpeft.data.text_files import encoding_of
from jaxpeft.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_PER_BATCH = 1000


def read_question_file(
    path: str, *, encoding: str | None = None, field: str | None = None, glob: bool = False, **options: Any
) -> Dataset:
    """Read a local file of questions, or several: a document of SQuAD (1.1 or 2.0), or a table of any other format.

    A document becomes a table with the columns of the hub: `id`, `title`, `question`, `context`, and `answers`, which holds the lists
    `text` and `answer_start`. `answers` is null if the file does not say what the answers are.

    Args:
      path: a .json file of the form `{"data": [{"paragraphs": [{"context": …, "qas": […]}]}]}`, or a file that `read_file` reads.
      encoding: as in `read_file`, and so are the others.
      field: the key of the rows in another .json file.
      glob: True if `path` is a pattern of several files.
      **options: those of `read_file` for tables.

    Raises:
      InputError: as `read_file`; or an article, paragraph or question of the document lacks something.
    """
    if glob:
        paths = matching_files(path)
        return joined(paths, [read_question_file(p, encoding=encoding, field=field, **options) for p in paths])
    given = [name for name, value in options.items() if value is not None]
    articles = None if given or field not in (None, "data") else _articles(os.path.expanduser(path), encoding)
    if articles is None:
        return read_file(path, encoding=encoding, field=field, **options)
    return _as_table(path, _rows(path, articles))


def _articles(path: str, encoding: str | None) -> list[Any] | None:
    """The articles of a document of SQuAD; None if the file is of another kind, or cannot be read."""
    if not path.lower().endswith(".json") or not os.path.isfile(path) or not os.path.getsize(path):
        return None
    try:
        with open(path, encoding=encoding_of(path, encoding)) as file:
            document = json.load(file)
    except ValueError:  # not JSON: `read_file` says why
        return None
    data = document.get("data") if isinstance(document, dict) else None
    is_squad = isinstance(data, list) and data and all(isinstance(a, dict) and "paragraphs" in a for a in data)
    return data if is_squad else None


def _rows(path: str, articles: list[Any]) -> Iterator[dict[str, Any]]:
    for number, article in enumerate(articles, 1):
        for paragraph_number, paragraph in enumerate(_list(article, "paragraphs", f"{path}, article {number}"), 1):
            where = f"{path}, article {number}, paragraph {paragraph_number}"
            context = _text(paragraph, "context", where)
            for qa_number, qa in enumerate(_list(paragraph, "qas", where), 1):
                question = _text(qa, "question", f"{where}, question {qa_number}")
                name = str(qa["id"]) if "id" in qa else None
                yield {
                    "id": name,
                    "title": str(article.get("title", "")),
                    "question": question,
                    "context": context,
                    "answers": _answers(qa, f"{where}, question {qa_number}" + (f" ({name})" if name else "")),
                }


def _answers(qa: dict[str, Any], where: str) -> dict[str, list[Any]] | None:
    impossible = qa.get("is_impossible", False)
    if "answers" not in qa and not impossible:
        return None
    answers = _list(qa, "answers", where) if "answers" in qa else []
    if impossible and answers:
        raise InputError(f"{where} is_impossible, and has answers; set is_impossible to false, or answers to []")
    for answer in answers:
        start = answer.get("answer_start") if isinstance(answer, dict) else None
        if not isinstance(start, int) or isinstance(start, bool) or not isinstance(answer.get("text"), str):
            raise InputError(f"{where}: the answer {str(answer)[:60]} needs a 'text' and a whole number 'answer_start'")
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


def _text(values: Any, key: str, where: str) -> str:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{where}: '{key}' is {str(found)[:40]!r}, not text; every one needs it")
    return found


def _list(values: Any, key: str, where: str) -> list[Any]:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, list):
        raise InputError(f"{where}: '{key}' is {str(found)[:40]!r}, not a list; every one needs it")
    return found


def _as_table(path: str, rows: Iterator[dict[str, Any]]) -> Dataset:
    """A table of the rows: a temporary file that is mapped into memory."""
    import pyarrow as pa
    from datasets import Dataset

    answers = pa.struct([("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int64()))])
    texts = [(name, pa.string()) for name in ("id", "title", "question", "context")]
    schema = pa.schema([*texts, ("answers", answers)])
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "rows.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            while batch := list(islice(rows, _ROWS_PER_BATCH)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        table = Dataset.from_file(file)
    if not len(table):
        raise InputError(f"{path} has no questions; give a file with at least one")
    return table
