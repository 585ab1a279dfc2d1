"""Messages name only flags that exist, and as users give them."""

import ast
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from jaxpeft.config import RunConfig

PACKAGE = Path(__file__).resolve().parents[1] / "jaxpeft"
SECTIONS = {
    each.name: {option.name for option in fields(each.default_factory)}
    for each in fields(RunConfig)
    if hasattr(each.default_factory, "__dataclass_fields__")
}
TOP = {each.name for each in fields(RunConfig)} - set(SECTIONS)
OTHER_PROGRAMS = {"--no-deps"}  # pip's
FILES = {"model.safetensors"}  # looks like a flag
USERS = ("cli", "comparison", "config", "data", "preflight", "runs", "tasks")
"""The rooms whose messages speak of flags. Those of the other rooms speak of arguments, which have no section."""


@cache
def messages(path):
    """(line, text) of every text of a file that is no docstring; the parts of an f-string are joined by {}."""
    tree = ast.parse(path.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append((node.lineno, "".join(map(str, parts))))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inside | docstrings):
            found.append((node.lineno, node.value))
    return found


def everywhere(rooms=()):
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not rooms or name.split("/")[0] in rooms:
            for line, text in messages(path):
                yield f"{name}:{line}: {text}", text


def test_flags_with_a_section_exist():
    pattern = re.compile(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z]\w*)(?![\w/]*\.\w)(?![\w]*\()")
    wrong = [
        place
        for place, text in everywhere()
        for section, option in pattern.findall(text)
        if option not in SECTIONS[section] and f"{section}.{option}" not in FILES
    ]
    assert not wrong, "\n".join(wrong)


def test_flags_with_dashes_exist():
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    known = set(re.findall(r'add_argument\(\s*"(--\w+)"', source))
    known |= {f"--{name}" for name in TOP} | {f"--{s}.{o}" for s, options in SECTIONS.items() for o in options}
    known |= {"--config", "--help", "--version"} | OTHER_PROGRAMS | comparison_flags()
    wrong = [
        place
        for place, text in everywhere()
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text)
        if flag.rstrip(".") not in known and not any(known_flag.startswith(f"{flag}.") for known_flag in known)
    ]
    assert not wrong, "\n".join(wrong)


def comparison_flags():
    from jaxpeft.comparison.grid import CompareConfig

    return {f"--{each.name}" for each in fields(CompareConfig)}


@pytest.mark.parametrize("room", USERS)
def test_flags_are_named_with_their_section(room):
    """A bare `num_labels` is no flag: `data.num_labels` is one. Names of one plain word are left out, because they are words."""
    bare = {option for options in SECTIONS.values() for option in options if "_" in option}
    pattern = re.compile(rf"(?<![\w./'-])({'|'.join(sorted(bare))})\b(?!\()")
    wrong = [place for place, text in everywhere((room,)) if len(text.split()) > 2 and pattern.search(text)]
    assert not wrong, "\n".join(wrong)
