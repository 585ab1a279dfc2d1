"""Plain English: two habits of the prose that a regular expression can find, counted over the package.

A count may only go down. After rewriting prose, lower the budget to the new count; the message has it.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "jaxpeft"

HABITS = {
    # "None where there is none", "InputError: where a value is missing": a condition begins with "if". Left alone is a "where" that
    # says a place ("the file where", "says where", "directory: where its files go"), and numpy's.
    "where for if": re.compile(
        r"(?:Error|Exit): where\b"
        r"|(?<!says )(?<!shows )(?<!knows )(?<!see )(?<!from )(?<!and )(?<!is )(?<!of )(?<!place )(?<!file )(?<!files, )(?<!folder )"
        r"(?<!directory )(?<!point )(?<!position )(?<!positions )(?<!np\.)(?<!`)(?<![a-z]: )\bwhere\b(?! to\b)(?![_(:])",
        re.IGNORECASE,
    ),
    # "What a method leaves in the run directory": a clause as a noun.
    "What as a noun": re.compile(r"(?:^|(?<=[.:;] )|(?<=\n))\s*What (?!is\b[^.]*\?|does\b[^.]*\?)[a-z]"),
}

BUDGET = {"where for if": 4, "What as a noun": 3}
"""Habit → how many sentences of the package may still have it."""

RIGHT: set[tuple[str, str]] = set()
"""(file, words): sentences that match a habit and are right as they stand."""


def texts(path):
    """(line, text) of a file's docstrings, including those of attributes, and of the messages of its errors and logs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        elif isinstance(node, ast.Call) and called(node).endswith(("Error", "log", "warn", "exit", "add_argument")):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def called(node):
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def found():
    """Habit → [file:line: words] over the whole package."""
    places = {habit: [] for habit in HABITS}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE.parent).as_posix()
        for line, text in texts(path):
            for habit, pattern in HABITS.items():
                for match in pattern.finditer(text):
                    words = text[max(match.start() - 30, 0) : match.end() + 40].replace("\n", " ")
                    if not any(name == file and right in text for file, right in RIGHT):
                        places[habit].append(f"{name}:{line + text[: match.start()].count(chr(10))}: …{words}…")
    return places


@pytest.mark.parametrize("habit", HABITS)
def test_the_habit_becomes_rarer(habit):
    places = found()[habit]
    by_room = Counter(place.split("/")[1].split(".py")[0] for place in places)
    assert len(places) <= BUDGET[habit], "\n".join(
        [f"{len(places)} sentences with '{habit}', {BUDGET[habit]} allowed; by room: {dict(by_room)}", *places]
    )


def test_the_habits_are_found():
    where, what = HABITS.values()
    assert where.search("InputError: where a value is missing")
    assert where.search("the rank, where there is one")
    assert not where.search("the directory where it is kept")
    assert not where.search("output_dir: where the run's files go")
    assert what.search("What the run started from.")
    assert not what.search("See what it says.")
