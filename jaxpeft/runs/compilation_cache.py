"""Keep compiled programs on disk, in jax's persistent compilation cache, so that later runs of the same shapes load them."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft.runs.user_cache import AUTO, default_folder, writable_folder

_FOLDER = "compiled"
_MIN_SECONDS = "jax_persistent_cache_min_compile_time_secs"
_MIN_SECONDS_OF_JAX = 1.0


def enable_compilation_cache(directory: str | None = AUTO, *, several_hosts: bool = False) -> None:
    """Let jax keep the programs of this process in `directory` and look for them there. Call it before anything compiles.

    One directory serves many machines: jax's keys cover the program, the versions of jax and XLA, their flags, and the
    devices, including a CPU's instruction sets. Settings of jax that the user has made are not changed: with
    `JAX_ENABLE_COMPILATION_CACHE=false` nothing is kept. The shortest compile time that is kept is lowered from jax's 1 s to 0,
    unless the user has set it. A new directory is readable and writable only by its owner, because anyone who can write to it
    can run code here.

    Args:
        directory: "auto", a directory, or a URL that jax can write to (gs://…); None keeps nothing. "auto" is
            `JAX_COMPILATION_CACHE_DIR` if it is set, else `default_directory`. If that cannot be written to, a warning is
            printed and nothing is kept.
        several_hosts: "auto" then means only `JAX_COMPILATION_CACHE_DIR`. Only the first host writes, so with a directory of
            its own every other host would find nothing.

    Raises:
        InputError: `directory` is given and cannot be written to.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    told = jax.config.values["jax_compilation_cache_dir"]
    if directory == AUTO:
        directory = told or (None if several_hosts else _writable(AUTO))
    elif directory and "://" not in directory:
        directory = _writable(directory)
    if directory != told:
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()  # an earlier compilation of this process may have opened another directory
    if _MIN_SECONDS.upper() not in os.environ and jax.config.values[_MIN_SECONDS] == _MIN_SECONDS_OF_JAX:
        # A run compiles some thirty small programs before its first step. Keeping them saves as much time as the large ones.
        jax.config.update(_MIN_SECONDS, 0.0)


def default_directory() -> Path:
    """`jaxpeft/compiled` in the user's cache directory."""
    return default_folder(_FOLDER)


def _writable(directory: str) -> str | None:
    folder = writable_folder(directory, name=_FOLDER, flag="compilation_cache", content="compiled programs")
    return str(folder) if folder else None
