"""Texts from standard input, and texts that are hardly meant to be texts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxpeft.errors import InputError


def with_standard_input(run: str, texts: Sequence[str]) -> list[str]:
    """`texts` with the lines of standard input in the place of "-". `run` is the run's directory, for messages.

    Raises:
        InputError: a text is the path of a file, which is hardly meant to be a text, or a line is blank.
    """
    for text in texts:
        if text != "-" and _is_path(text):
            raise InputError(
                f"'{text}' is a path here, and predict takes texts. Its texts: python -m jaxpeft predict {run} --file {shlex.quote(text)}; "
                f"the name itself: echo {shlex.quote(text)} | python -m jaxpeft predict {run} -"
            )
    return [line for text in texts for line in (_standard_input() if text == "-" else [text])]


def _is_path(text: str) -> bool:
    try:
        return bool(text) and Path(text).exists()
    except OSError:  # a text may be too long for a name
        return False


def _standard_input() -> list[str]:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"standard input, line {line}: not utf-8; convert it, for example with iconv") from error
    lines = text.split("\n")
    blank = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if blank:
        raise InputError(f"standard input, line {blank[0]}: it is blank; give one text a line")
    return lines
