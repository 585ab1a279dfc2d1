"""Parse flags into configurations, with jsonargparse. This module adds errors of one line that name the nearest flag."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from jaxpeft.adapters.options import PEFT_NAMES
from jaxpeft.config.plain_errors import in_plain_words, last_text, may_be_none
from jaxpeft.config.run import RunConfig
from jaxpeft.errors import InputError, did_you_mean, fail

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the docstring of a field is its help text

C = TypeVar("C")

_TRAINS = "Fine-tune a Flax transformer with adapters."


class Parser(ArgumentParser):
    """jsonargparse's parser. An error exits with status 2 and prints one line that names the nearest flag."""

    _given: Sequence[str] = ()  # for the messages about them

    def __init__(self, *args: Any, **options: Any) -> None:
        """As the base class, but a flag must be written in full: the beginning of its name may be another flag's tomorrow."""
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:  # type: ignore[override]
        """Parse `args`. Unlike the base class, take a text that means null in YAML, such as "#a.csv", as the text that it is."""
        self._given = args or ()
        values = super().parse_args(args, *rest, **options)
        for flag, hint in self._types().items():
            if may_be_none(hint) and values.get(flag) is None and (text := last_text(self._given, flag)) is not None:
                values[flag] = text
        return values

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the problem and the way out in one line, and exit with status 2."""
        fail(self._in_words(message), prog=self.prog, hint=f"see {self.prog} --help")

    def _in_words(self, message: str) -> str:
        text = re.sub(r"\s+", " ", message).strip()
        return f"{in_plain_words(text, self._types(), self._given)}{self._suggestion(text)}"

    def _types(self) -> dict[str, Any]:
        return {action.dest: hint for action in self._actions if (hint := getattr(action, "_typehint", action.type))}

    def _suggestion(self, text: str) -> str:
        # jsonargparse has three messages for an unknown key.
        keys = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        unknown = re.search(r"(?:arguments: --|option |key )'?(?:adapter\.)?(\w+)", text)
        if unknown and (ours := PEFT_NAMES.get(unknown[1])) and f"adapter.{ours}" in keys:
            return f"; it is PEFT's name: call it --adapter.{ours}"
        if found := re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", text):
            return did_you_mean(found[1].replace("-", "_"), keys).replace("'", "--", 1).replace("'?", "?")
        if found := re.search(r"[Gg]roup '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", text):
            return did_you_mean(f"{found[1]}.{found[2]}", keys)
        if found := re.search(r"Option '([\w.]+)' is not accepted", text):
            return did_you_mean(found[1], keys)
        return ""


class ValuesParser(Parser):
    """The same for values that are part of a file. Errors raise InputError."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise InputError with the problem and the nearest key. The caller, who knows it, adds the origin of the values."""
        raise InputError(self._in_words(message))


def parse_run(args: list[str], prog: str, default_config: Path | None = None) -> Callable[[], RunConfig]:
    """Parse a run's flags and return a function that builds and checks the configuration.

    An error in syntax, names or types exits with status 2. The returned function raises InputError.
    """
    return _parse(_train_parser(prog, default_config), args, default_config)[1]


def parse_run_and(
    args: list[str], prog: str, *, description: str, add_flags: Callable[[Parser], None]
) -> tuple[Any, Callable[[], RunConfig]]:
    """As `parse_run`, for a command with further flags. Returns all values, and the function of `parse_run`."""
    parser = _run_parser(prog, None, description)
    add_flags(parser)
    return _parse(parser, args, None)


def parse_file_into(kind: type[C], args: list[str], prog: str, *, description: str) -> Callable[[], C]:
    """As `parse_run`, for a command with another configuration: the dataclass `kind`."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --config FILE [--KEY VALUE ...]",
        description=f"{description} Every key of a config file is also a flag, and flags override the file.",
        exit_on_error=True,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(kind)
    # field.type is text, because annotations are not evaluated.
    args, deep = _without_deep_flags(args, [field.name for field in fields(kind) if str(field.type).startswith("dict")])  # type: ignore[arg-type]
    values = _parse(parser, args, None)[0]

    def build() -> C:
        instantiated = parser.instantiate(values)
        given = {name: instantiated[name] for name in vars(values) if name != "config"}
        for (name, *keys, last), value in deep:
            place = given[name] = deepcopy(given[name])
            for key in keys:
                place = place.setdefault(key, {})
            place[last] = value
        return kind(**given)

    return build


def _without_deep_flags(args: list[str], names: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """`args` without the flags for keys inside the mappings `names`, and those flags as (path, value).

    The parser would let `--base.training.num_steps 6` replace all of base.training.
    """
    left, deep, rest = [], [], iter(args)
    for arg in rest:
        flag, equals, text = arg.partition("=")
        path = flag.removeprefix("--").split(".")
        if not flag.startswith("--") or len(path) < 2 or path[0] not in names:
            left.append(arg)
            continue
        deep.append((path, yaml.safe_load(text if equals else next(rest, ""))))
    return left, deep


def _parse(parser: Parser, args: list[str], default_config: Path | None) -> tuple[Any, Callable[[], RunConfig]]:
    args = _with_one_source(_bare_switches(args))
    if default_config and not any(arg == "--config" or arg.startswith("--config=") for arg in args):
        args = ["--config", str(default_config), *args]
    _check_yaml(args, parser.prog)  # before the parser, whose error does not name the file
    values = parser.parse_args(args)
    return values, lambda: build_run(parser, values)


def build_run(parser: Parser, values: Any) -> RunConfig:
    """Build and check the configuration of parsed `values`.

    Raises:
        InputError: a group of keys is a single value, which jsonargparse lets pass, or the values cannot be combined.
    """
    for field in fields(RunConfig):
        value = values[field.name]
        if field.default is MISSING and not isinstance(value, Namespace):
            raise InputError(
                f"{field.name} is {'empty' if value is None else value}; it must be a group of keys, such as {{name: value}}; "
                "leave it out for the defaults"
            )
    instantiated = parser.instantiate(values)
    return RunConfig(**{field.name: instantiated[field.name] for field in fields(RunConfig)})


@cache
def run_values_parser() -> ValuesParser:
    """The parser of a run's values. Made once: making it takes longer than parsing, and a comparison parses hundreds of runs."""
    parser = ValuesParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RunConfig)
    return parser


@cache  # for a program that makes several runs
def _train_parser(prog: str, default_config: Path | None) -> Parser:
    return _run_parser(prog, default_config)


def _run_parser(prog: str, default_config: Path | None, description: str = _TRAINS) -> Parser:
    """The parser for a run's flags. `default_config` is only named in the help."""
    default = f" Without --config: {default_config.parent.name}/{default_config.name}." if default_config else ""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",
        description=f"{description} Every key of a config file is also a flag, and flags override the file." + default,
        exit_on_error=True,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(RunConfig)
    return parser


def _check_yaml(args: list[str], prog: str) -> None:
    """Exit with the name of a config file that is not YAML, because jsonargparse does not name it."""
    for i, arg in enumerate(args):
        named = arg.partition("=")[2] if arg.startswith("--config=") else arg if args[i - 1 : i] == ["--config"] else ""
        path = Path(named)
        try:
            values = yaml.safe_load(path.read_text() if path.is_file() else "")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            # Without the excerpt of the file, whose lines would run together.
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
            fail(f"{path}{f', line {mark.line + 1}' if mark else ''}: not YAML: {problem or error}", prog=prog)
        if not isinstance(values, dict | None):
            fail(f"{path} does not hold keys: write lines such as 'name: my-run'", prog=prog)


def _bare_switches(args: list[str]) -> list[str]:
    """Expand `--resume` and `--distributed` without a value to `--resume=true` and `--distributed=true`."""
    switches = ("--resume", "--distributed")
    return [
        f"{arg}=true" if arg in switches and args[i + 1 : i + 2] not in (["true"], ["false"]) else arg
        for i, arg in enumerate(args)
    ]


def _with_one_source(args: list[str]) -> list[str]:
    """`args` in which the flag of a file also takes back the name of a dataset that a config file has, and the name the files."""
    given = {arg.partition("=")[0] for arg in args}
    is_file, is_name = "--data.train_file" in given, "--data.name" in given
    if is_file == is_name:
        return args
    others = ["name"] if is_file else ["train_file", "validation_file", "test_file"]
    return [*args, *(f"--data.{name}=null" for name in others if f"--data.{name}" not in given)]
