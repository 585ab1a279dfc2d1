"""Opens Flax's msgpack files without reading them whole: finds each leaf, and reads one leaf at a time.

Flax's own `msgpack_restore` turns the whole file into arrays at once. A quantised base must never be in memory in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from jaxpeft.errors import InputError

# flax.serialization's mark of an array of more than 1 GB, which is stored as a dictionary of pieces.
_CHUNKED = b"__msgpack_chunked_array__"


def msgpack_leaves(file: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Return the leaves of a Flax checkpoint: path joined by slashes → function that reads the array.

    Raises:
        InputError: if the file is not msgpack of nested dictionaries, or is cut off.
    """
    from msgpack.exceptions import UnpackException

    try:
        return {path: partial(_read, file, begin, end) for path, begin, end in _extents(file)}
    except (UnpackException, ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read as Flax msgpack: {error}; fetch it again") from error


def _extents(file: Path) -> Iterator[tuple[str, int, int]]:
    """Yield path, first byte and end of each leaf."""
    from msgpack import Unpacker

    with file.open("rb") as stream, file.open("rb") as peeking:
        unpacker = Unpacker(stream, raw=False, max_buffer_size=file.stat().st_size)

        def walk(path: str) -> Iterator[tuple[str, int, int]]:
            begin = unpacker.tell()
            peeking.seek(begin)
            first = peeking.read(len(_CHUNKED) + 8)
            if _is_map(first) and _CHUNKED not in first:
                for _ in range(unpacker.read_map_header()):
                    key = unpacker.unpack()
                    yield from walk(f"{path}/{key}" if path else key)
            elif path:
                unpacker.skip()
                yield path, begin, unpacker.tell()
            else:
                raise ValueError("it does not begin with a dictionary")

        yield from walk("")


def _is_map(first: bytes) -> bool:
    return bool(first) and (first[0] & 0xF0 == 0x80 or first[0] in (0xDE, 0xDF))


def _read(file: Path, begin: int, end: int) -> np.ndarray:
    from flax.serialization import msgpack_restore

    with file.open("rb") as stream:
        stream.seek(begin)
        return np.asarray(msgpack_restore(stream.read(end - begin)))
