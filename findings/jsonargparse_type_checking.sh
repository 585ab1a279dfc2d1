#!/usr/bin/env bash
# jsonargparse 4.53.0 resolves a type alias from the block that only type checkers read.
#
# A dataclass field is annotated with an alias that is `str` under `if TYPE_CHECKING:` and a `Literal` computed at run time in the
# `else:` block. dataclasses, typing.get_type_hints and inspect all see the Literal. jsonargparse also executes the source of the
# TYPE_CHECKING block to resolve forward references, takes the `str` from there, and accepts every value on the command line.
# Written as `if not TYPE_CHECKING:` first, the same alias is the Literal, and a wrong value is refused.
#
# Seen with jsonargparse 4.53.0 on Python 3.11:
#   get_type_hints: typing.Literal['a', 'b']
#   if TYPE_CHECKING: accepted zzz
#   if not TYPE_CHECKING: refused
# Exit status 0 if this is still so, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'jsonargparse[signatures]==4.53.0'

program() { # the two blocks, in this order
    cat <<PYTHON
from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_type_hints

from jsonargparse import ArgumentParser

$1


@dataclass
class Options:
    name: Name = "a"


print("get_type_hints:", get_type_hints(Options)["name"])
parser = ArgumentParser(exit_on_error=False)
parser.add_class_arguments(Options)
try:
    print("$2 accepted", parser.parse_args(["--name", "zzz"]).name)
except Exception:
    print("$2 refused")
PYTHON
}

program $'if TYPE_CHECKING:\n    Name = str\nelse:\n    Name = Literal["a", "b"]' 'if TYPE_CHECKING:' >"$work/plain.py"
program $'if not TYPE_CHECKING:\n    Name = Literal["a", "b"]\nelse:\n    Name = str' 'if not TYPE_CHECKING:' >"$work/negated.py"
found=$("$work/venv/bin/python" "$work/plain.py"; "$work/venv/bin/python" "$work/negated.py")
echo "$found"
expected="get_type_hints: typing.Literal['a', 'b']
if TYPE_CHECKING: accepted zzz
get_type_hints: typing.Literal['a', 'b']
if not TYPE_CHECKING: refused"
[ "$found" = "$expected" ] || { echo "this has changed" >&2; exit 1; }
