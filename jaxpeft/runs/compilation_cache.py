"""Compiled programs kept on disk (jax's persistent compilation cache): the next run of the same shapes loads what this one compiled."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft.errors import InputError
from jaxpeft.report.console import log

AUTO = "auto"
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_MIN_SECONDS_OF_JAX = 1.0


def enable_compilation_cache(directory: str | None = AUTO, *, several_hosts: bool = False) -> None:
    """Let jax keep the programs of this process in `directory` and look for them there; call it before anything compiles.

    A key of jax's covers the program, the versions of jax and XLA, their flags, and the devices, a CPU's instruction sets included:
    one directory serves many machines. What a user told jax in its own terms stays: `JAX_ENABLE_COMPILATION_CACHE=false` keeps
    nothing, and thresholds are kept. Whoever may write to the directory can run code here: it is made for its owner alone.

    Args:
        directory: "auto", a directory, or a URL that jax can write to (gs://…); None keeps nothing. "auto" is where jax was told to
            keep them (`JAX_COMPILATION_CACHE_DIR`), else `default_directory`; where that cannot be written to, none, and it is said.
        several_hosts: "auto" is then only where jax was told: in a directory of each host's own all but the first, which alone
            writes, would find nothing.

    Raises:
        InputError: where `directory` is given and cannot be written to.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    told = jax.config.values["jax_compilation_cache_dir"]
    if directory == AUTO:
        directory = told or (None if several_hosts else _writable_default())
    elif directory and "://" not in directory:
        directory = os.path.abspath(os.path.expanduser(directory))
        if reason := _why_not_writable(Path(directory)):
            raise InputError(f"compilation_cache {directory}: {reason}; give another directory, or null for none")
    if directory != told:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # what this process has compiled before may have opened another
    if _MIN_SECONDS.upper() not in os.environ and jax.config.values[_MIN_SECONDS] == _MIN_SECONDS_OF_JAX:
        # A start compiles some thirty small programs besides the large ones: kept, they save as much again.
        jax.config.update(_MIN_SECONDS, 0.0)


def default_directory() -> Path:
    """`jaxpeft/compiled` in the user's cache: `XDG_CACHE_HOME`, or `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "jaxpeft" / "compiled"


def _writable_default() -> str | None:
    directory = default_directory()
    reason = _why_not_writable(directory) if directory.is_absolute() else "no home directory"
    if reason:
        log(
            f"warning: compiled programs are not kept in {directory}: {reason}; give a directory as compilation_cache, or null"
        )
        return None
    return str(directory)


def _why_not_writable(directory: Path) -> str:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return ""
    except OSError as error:
        return error.strerror or str(error)
