"""The parser's messages in plain words: what was given, and what a flag takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jaxpeft.errors import did_you_mean

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}
_EXAMPLES = {int: ("8", "16"), float: ("0.1", "0.5")}
_WORD = re.compile(r"[^\s\[\]{},:#]+")  # a text that needs no quotes in a list
_LIKE = {int: re.compile(r"\d+"), float: re.compile(r"\d*\.?\d+")}
_NO_VALUE = re.compile(r"argument --([\w.]+)[^:]*: expected (?:one|at least one) argument")
_NO_KEYS = re.compile(r"Unexpected config: (.*)")
_SURPLUS = re.compile(r"[Uu]nrecognized arguments: (?!--)(\S+)")


def in_plain_words(message: str, types: Mapping[str, Any], args: Sequence[str]) -> str:
    """The parser's `message` about a value, in plain words; other messages are returned as they are.

    Args:
        message: the message of jsonargparse, in one line.
        types: flag → annotation of its value.
        args: the arguments that were parsed.
    """
    if found := _NO_VALUE.search(message):
        return f"--{found[1]} needs a value: {in_words(types.get(found[1]))}"
    if found := _SURPLUS.search(message):
        return _surplus(message, found[1], types, args)
    if found := _NO_KEYS.fullmatch(message):
        return (
            f"a config file holds '{found[1]}' without keys: write lines such as 'name: my-run' below it, or remove it"
        )
    keys = list(re.finditer(r'Parser key "([\w.]+)":? ?', message))
    if not keys:
        return message
    key, rest = keys[-1][1], message[keys[-1].end() :]
    if "Unable to load config" in rest:
        return f"{key} is a group of flags, not a flag: give one of them, such as --{_first_of(key, types)}"
    # The innermost value comes first, and the whole one last.
    value = re.split(r"(?:Got|Given) value: ", rest)
    if len(value) == 1 or key not in types:
        return f"{key}: {rest}"
    hint = types[key]
    near = did_you_mean(value[-1], map(str, choices(hint)))
    return f"{key} is '{value[-1]}'; it must be {in_words(hint, _values_of(args, key))}{near}"


def choices(hint: Any) -> list[Any]:
    """The values that the `Literal`s of an annotation list."""
    return [value for part in _parts(hint) if get_origin(part) is Literal for value in get_args(part)]


def may_be_none(hint: Any) -> bool:
    """True for a text that may be None."""
    return set(_parts(hint)) == {str, NoneType}


def last_text(args: Sequence[str], flag: str) -> str | None:
    """The text that `args` give the flag last; None if they do not have it, or say null."""
    given = [values[0] for place, arg in enumerate(args) if (values := _values_at(args, place)) and _name(arg) == flag]
    return given[-1] if given and given[-1].lower() != "null" else None


def in_words(hint: Any, given: Sequence[str] = ()) -> str:
    """The values that an annotation allows, such as "a whole number, or null". A list's example is of the `given` words, if it can be."""
    known = choices(hint)
    words = [f"{'one of ' if len(known) > 1 else ''}{', '.join(map(str, known))}"] if known else []
    others = [part for part in _parts(hint) if get_origin(part) is not Literal]
    words += [_word(part, given) for part in sorted(others, key=lambda part: part is NoneType)]
    return ", or ".join(words)


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _word(part: Any, given: Sequence[str]) -> str:
    kind = get_origin(part) or part
    if kind is list:
        fitting = given if all(_LIKE.get(_item(part), _WORD).fullmatch(value) for value in given) else ()
        return f"a list of {_SEVERAL.get(_item(part), 'values')} in brackets, such as {_list_of(part, fitting)}"
    if kind is dict:
        return "a mapping in braces, such as '{name: value}'"
    return _WORDS.get(part, "a value")


def _item(part: Any) -> Any:
    return (get_args(part) or (Any,))[0]


def _list_of(part: Any, values: Sequence[str] = ()) -> str:
    return f"'[{', '.join(values or _EXAMPLES.get(_item(part), ('one', 'two')))}]'"


def _name(arg: str) -> str:
    """The flag of an argument such as `--data.name`, `--data.name=x` or `--data.column_names+`."""
    return arg.removeprefix("--").partition("=")[0].rstrip("+") if arg.startswith("--") else ""


def _values_at(args: Sequence[str], place: int) -> list[str]:
    """The words after the flag at `place`, up to the next flag."""
    end = next((i for i in range(place + 1, len(args)) if args[i].startswith("--")), len(args))
    return [*args[place].split("=", 1)[1:], *args[place + 1 : end]]


def _values_of(args: Sequence[str], flag: str) -> list[str]:
    places = [place for place, arg in enumerate(args) if _name(arg) == flag]
    return _values_at(args, places[-1]) if places else []


def _surplus(message: str, word: str, types: Mapping[str, Any], args: Sequence[str]) -> str:
    """The message about a `word` after a flag's value; `message` itself if no flag is in front of it."""
    before = [place for place in range(list(args).index(word)) if args[place].startswith("--")] if word in args else []
    if not before:
        return message
    flag, values = _name(args[before[-1]]), _values_at(args, before[-1])
    hint = types.get(flag)
    if hint is bool:
        return f"{flag} is '{word}'; it must be {in_words(hint)}"
    what = f"--{flag} takes one value, and '{word}' follows it"
    lists = [part for part in _parts(hint) if (get_origin(part) or part) is list]
    if lists:
        return f"{what}: write a list in brackets, --{flag} {_list_of(lists[0], values)}"
    return (
        f'{what}: leave it out or, if it is part of the value, put the value in quotes, --{flag} "{" ".join(values)}"'
    )


def _first_of(group: str, types: Mapping[str, Any]) -> str:
    return next((flag for flag in types if flag.startswith(f"{group}.")), group)
