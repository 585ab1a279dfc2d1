"""Keep other processes away from a directory while this one works in it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from jaxpeft.errors import InputError


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[IO[str]]:
    """Lock the existing file at `path` while the block runs, and give the block the open file. The file is not written to.

    A file system without locks, such as a mounted bucket, keeps nobody away.

    Raises:
        InputError: another process holds the lock. `refusal` is the message.
    """
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(refusal) from None
        except OSError:
            pass
        yield file
