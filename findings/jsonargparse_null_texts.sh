#!/usr/bin/env bash
# jsonargparse 4.53.0 turns some texts on the command line into None, without a word.
#
# The values of an option of type `str` are texts, whatever their characters. Of `Optional[str]`, which most options with a default of
# None have, each value is first read as YAML: a text that begins with "#" is a comment there, "~" is null, and "&x" is an anchor of
# nothing. All three arrive as None, as if the option had not been given. So a file called "#1.csv", given by name, is not read, and
# nothing says so; `str` and `Optional[str]` differ only in that. Other texts that mean something in YAML ("1e5", "yes", "[a]") stay texts.
#
# Seen with jsonargparse 4.53.0 on Python 3.11:
#   str            '#1.csv' '~' '&x' '1e5' 'yes' '[a]'
#   Optional[str]  None None None '1e5' 'yes' '[a]'
# Exit status 0 if this is still so, 1 if not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'jsonargparse[signatures]==4.53.0'
cat >"$work/program.py" <<'PYTHON'
from typing import Optional

from jsonargparse import ArgumentParser

for title, kind in (("str", str), ("Optional[str]", Optional[str])):
    parser = ArgumentParser()
    parser.add_argument("--file", type=kind, default=None)
    found = [repr(parser.parse_args(["--file", text]).file) for text in ("#1.csv", "~", "&x", "1e5", "yes", "[a]")]
    print(f"{title:14} {' '.join(found)}")
PYTHON
found=$("$work/venv/bin/python" "$work/program.py")
echo "$found"
expected="str            '#1.csv' '~' '&x' '1e5' 'yes' '[a]'
Optional[str]  None None None '1e5' 'yes' '[a]'"
[ "$found" = "$expected" ] || { echo "this has changed" >&2; exit 1; }
