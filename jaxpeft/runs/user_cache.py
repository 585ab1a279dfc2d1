"""Folders in the user's cache directory, for files of a run that later runs can use again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from jaxpeft.errors import InputError
from jaxpeft.report.console import log

AUTO = "auto"


def default_folder(name: str) -> Path:
    """`jaxpeft/NAME` in the user's cache directory: `XDG_CACHE_HOME`, or `~/.cache` if that is not set."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "jaxpeft" / name


def writable_folder(directory: str, *, name: str, flag: str, content: str) -> Path | None:
    """The folder that a flag names, created if it does not exist. A new one is readable and writable only by its owner.

    Args:
        directory: the flag's value: "auto", or a directory.
        name: "auto" is `default_folder(name)`. If it cannot be written to, a warning is printed and the result is None.
        flag: the flag, for messages.
        content: what is kept in the folder, for messages.

    Raises:
        InputError: a directory is given and cannot be written to.
    """
    if directory == AUTO:
        folder = default_folder(name)
        reason = _why_not_writable(folder) if folder.is_absolute() else "no home directory"
        if reason:
            log(f"warning: {content} are not kept in {folder}: {reason}; give a directory as {flag}, or null")
            return None
        return folder
    folder = Path(os.path.abspath(os.path.expanduser(directory)))
    if reason := _why_not_writable(folder):
        raise InputError(f"{flag} {folder}: {reason}; give another directory, or null for none")
    return folder


def _why_not_writable(directory: Path) -> str:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)
