"""What every command does around its work: the process's environment, and errors of one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from jaxpeft.errors import InputError, fail


def own_process() -> list[str]:
    """The arguments of this process, for a command that has the process to itself.

    Keeps transformers and datasets from importing torch or TensorFlow if they are installed: torch takes two seconds and 200 MB.
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
