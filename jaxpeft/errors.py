"""The only exception that a user can cause. The command line shows it in one line and exits with status 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn


class InputError(ValueError):
    """A user's input is invalid or cannot be carried out.

    The message names the value, its origin and the way out, in one line. The command line prints it and exits with
    status 2. Every other exception is a bug of ours and keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'rank'?"` for the known name nearest to `name`, or an empty string if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def check_choice(what: str, value: object, choices: Iterable[object]) -> None:
    """Check that `value` is one of `choices`. For options with a few fixed values; things that can be added have a registry.

    Raises:
        InputError: it is not. The message has `what`, the value and the choices.
    """
    known = list(choices)
    if value not in known:
        raise InputError(f"{what} is {value!r}; it must be one of {', '.join(map(str, known))}")


def fail(message: str, *, prog: str, hint: str | None = None) -> NoReturn:
    """Print one line to standard error and exit with status 2."""
    line = " ".join(message.split())
    print(f"{prog}: error: {line}" + (f" ({hint})" if hint else ""), file=sys.stderr)
    sys.exit(2)
