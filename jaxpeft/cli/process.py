"""Common to all commands: the environment of the process, and errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from jaxpeft.errors import InputError, fail


def own_process() -> list[str]:
    """Prepare a process that runs only one command, and return its arguments.

    transformers and datasets would import torch and TensorFlow if they are installed, and torch takes two seconds and 200 MB.
    Environment variables keep them from it.
    """
    for framework in ("USE_TORCH", "USE_TF"):
        os.environ.setdefault(framework, "0")
    return sys.argv[1:]


def guarded(action: Callable[[], None], prog: str) -> None:
    """Run `action`. A user's mistake becomes one line and status 2; a bug keeps its traceback."""
    try:
        action()
    except InputError as error:
        fail(str(error), prog=prog)
