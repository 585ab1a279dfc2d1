"""Tokenised rows: made once, chunk by chunk, and kept in an Arrow file that a later start maps into memory.

The file `DIRECTORY/FINGERPRINT.arrow` is a table of one record batch. Each of its columns has the token ids of a row as a list;
`datasets.Dataset.from_file` opens it. Its fingerprint covers the texts, the tokenizer and all that decides the rows, so a file is
never out of date and never changed. It is written under another name and renamed when it is whole: two runs may make the same
file at once, and a run that is killed leaves no file that looks whole.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxpeft.data.texts import TextColumn, hash_texts

_FORMAT = 1  # of the files; another number makes all files anew
_ALIGNMENT = 64  # bytes; jax uses an array of such an address as it is, and copies any other
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Token ids of rows of different lengths, concatenated.

    Attributes:
      tokens: by name, `[tokens]` int32, such as `input_ids`.
      offsets: `[rows + 1]` int64; row i is `tokens[name][offsets[i]:offsets[i + 1]]`.
      num_truncated: number of rows that were cut to the maximum length.
    """

    tokens: Mapping[str, np.ndarray]
    offsets: np.ndarray
    num_truncated: int = 0


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some consecutive rows: the fields of `TokenRows`, with the rows' `lengths`, `[rows]` int, instead of offsets."""

    tokens: Mapping[str, np.ndarray]
    lengths: np.ndarray
    num_truncated: int = 0


@dataclass(frozen=True)
class Origin:
    """Everything that decides the tokens of rows.

    Attributes:
      kind: the name of the function that makes the rows.
      columns: the texts, and their pairs if there are any.
      tokenizer: a transformers tokenizer.
      length: the maximum or the fixed number of tokens per row.
    """

    kind: str
    columns: tuple[Sequence[str], ...]
    tokenizer: Any
    length: int

    def fingerprint(self) -> str:
        """SHA-256 of the contents. Names and places of files do not matter."""
        libraries = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
        parts = [_FORMAT, self.kind, self.length, libraries, _hash_tokenizer(self.tokenizer)]
        return hashlib.sha256(json.dumps([*parts, *map(hash_texts, self.columns)]).encode()).hexdigest()


def _hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of the files that the tokenizer would be saved as."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for file in sorted(Path(directory).rglob("*")):
            content = file.read_bytes() if file.is_file() else b""
            if file.name == "tokenizer.json":
                # The last call's limits, which the next call sets anew.
                content = json.dumps(json.loads(content) | {"truncation": None, "padding": None}).encode()
            digest.update(f"{file.relative_to(directory)} {len(content)} ".encode() + content)
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenCache:
    """A directory of tokenised rows.

    Attributes:
      directory: the directory. It is created when it is first written to, readable only by its owner.
      log: is called with one line if a file is damaged, or cannot be written.
    """

    directory: Path
    log: Callable[[str], None]

    def rows(self, origin: Origin, names: Sequence[str], make: Callable[[], Iterable[Chunk]]) -> TokenRows:
        """The rows of `origin`: mapped from their file, which is written first from the chunks of `make` if there is none."""
        path = self.directory / f"{origin.fingerprint()}.arrow"
        try:
            return _read(path, names)
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged file can fail in any way
            self.log(f"warning: the token cache's {path} is damaged ({_reason(error)}); its rows are tokenised again")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_abandoned(self.directory)
            _write(path, names, make())
            return _read(path, names)
        except OSError as error:
            self.log(
                f"warning: no tokens are kept in {self.directory}: {_reason(error)}; give a directory as data.token_cache, or null"
            )
            return collect(names, make())


def tokenised(
    origin: Origin, names: Sequence[str], make: Callable[[], Iterable[Chunk]], cache: TokenCache | None
) -> TokenRows:
    """The rows of the chunks that `make` returns, with the token columns `names`.

    They come from `cache` if there is one and the texts are a `TextColumn`. Lists of texts are already in memory, so they are
    small, and their rows are made in memory too.
    """
    if cache is None or not isinstance(origin.columns[0], TextColumn):
        return collect(names, make())
    return cache.rows(origin, names, make)


def collect(names: Sequence[str], chunks: Iterable[Chunk]) -> TokenRows:
    """The rows of `chunks` in memory."""
    made = list(chunks)
    tokens = {name: np.concatenate([np.zeros(0, np.int32), *(chunk.tokens[name] for chunk in made)]) for name in names}
    return TokenRows(tokens, _offsets([chunk.lengths for chunk in made]), sum(chunk.num_truncated for chunk in made))


def _offsets(lengths: Sequence[np.ndarray]) -> np.ndarray:
    return np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]), dtype=np.int64)


def _write(path: Path, names: Sequence[str], chunks: Iterable[Chunk]) -> None:
    """Write `chunks` to `path` as one record batch, without holding more than one of them in memory."""
    import pyarrow as pa  # not at the top: it is a part of `datasets`, which is loaded only for files and the hub

    with ExitStack() as stack:
        # How long a record batch is must be known before it is written, so the tokens first go to files without a name.
        parts = {name: stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for name in names}
        lengths, num_truncated = [], 0
        for chunk in chunks:
            for name, part in parts.items():
                part.write(np.ascontiguousarray(chunk.tokens[name], np.int32).data)
            lengths.append(np.asarray(chunk.lengths, np.int64))
            num_truncated += chunk.num_truncated
        offsets = _offsets(lengths)
        tokens = {name: _mapped(part) for name, part in parts.items()}
        about = {"num_truncated": num_truncated, "checksum": _checksum(tokens.values(), offsets)}
        arrays = [pa.LargeListArray.from_arrays(offsets, values) for values in tokens.values()]
        schema = _aligned_schema(names, about, len(offsets))
        with (
            _renamed_when_whole(path) as file,
            pa.OSFile(str(file), "wb") as sink,
            # Without the option a column holds at most 2³¹ - 1 tokens.
            pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(allow_64bit=True)) as writer,
        ):
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _mapped(file: IO[bytes]) -> np.ndarray:
    file.flush()
    # An empty file cannot be mapped.
    return np.memmap(file, np.int32, mode="r") if file.tell() else np.zeros(0, np.int32)


def _aligned_schema(names: Sequence[str], about: Mapping[str, Any], num_offsets: int) -> Any:
    """The file's schema. Its metadata are `about`, and so many blanks that the first column's tokens are aligned."""
    import pyarrow as pa

    kind = pa.large_list(pa.int32())

    def schema(num_blanks: int) -> Any:
        metadata = {"jaxpeft": json.dumps(about), "blanks": " " * num_blanks}
        return pa.schema([pa.field(name, kind) for name in names], metadata=metadata)

    # Behind the schema stand the first column's offsets, 8 bytes each, and its tokens.
    sink, plain = pa.BufferOutputStream(), schema(0)
    with pa.ipc.new_stream(sink, plain) as writer:
        writer.write_batch(pa.record_batch([pa.array([[0]], kind)] * len(names), schema=plain))
    file = sink.getvalue()
    tokens = pa.ipc.open_stream(file).read_next_batch().column(0).values.buffers()[1]
    start = tokens.address - file.address + 8 * (num_offsets - 2)
    return schema(-start % _ALIGNMENT)


@contextmanager
def _renamed_when_whole(path: Path) -> Iterator[Path]:
    unfinished = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed runs have left, if it is a day old."""
    for file in directory.glob("*.unfinished"):
        if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
            file.unlink(missing_ok=True)


def _read(path: Path, names: Sequence[str]) -> TokenRows:
    """Map the rows of a file into memory.

    Raises FileNotFoundError if it does not exist, and another error if it is not as it was written.
    """
    import pyarrow as pa

    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    reader = pa.ipc.open_stream(pa.py_buffer(mapped))
    about = json.loads(reader.schema.metadata[b"jaxpeft"])
    batch = reader.read_next_batch()
    tokens = {name: batch.column(name).values.to_numpy() for name in names}
    offsets = batch.column(names[0]).offsets.to_numpy()
    if _checksum(tokens.values(), offsets) != about["checksum"]:
        raise ValueError("its checksum is wrong")
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)  # the checksum has read everything; a batch reads only its rows
    return TokenRows(tokens, offsets, about["num_truncated"])


def _checksum(tokens: Iterable[np.ndarray], offsets: np.ndarray) -> int:
    value = zlib.crc32(np.ascontiguousarray(offsets).data)
    for values in tokens:
        value = zlib.crc32(values.data, value)
    return value


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
