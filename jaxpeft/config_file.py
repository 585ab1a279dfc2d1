"""Flags and YAML files to a `RunConfig` and back. jsonargparse reads them; what is ours is errors of one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from jaxpeft.config import RunConfig
from jaxpeft.errors import InputError, near

set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")

_TRAINS = "Fine-tune a Flax transformer with adapters."


class Parser(ArgumentParser):
    """jsonargparse's parser with errors of one line that name the nearest flag; exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what was wrong and the way out, and exit."""
        text = re.sub(r"\s+", " ", message).strip()
        fail(f"{text}{self._suggestion(text)}", prog=self.prog, hint=f"see {self.prog} --help")

    def _suggestion(self, text: str) -> str:
        keys = [action.dest for action in self._actions if action.dest not in ("help", "print_config")]
        if found := re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", text):
            return near(found[1].replace("-", "_"), keys).replace("'", "--", 1).replace("'?", "?")
        if found := re.search(r"[Gg]roup '([\w.]+)' does not accept (?:option|nested key) '([\w.]+)'", text):
            return near(f"{found[1]}.{found[2]}", keys)
        if found := re.search(r"Option '([\w.]+)' is not accepted", text):
            return near(found[1], keys)
        return ""


class _ValuesParser(Parser):
    """The same for values that are a part of a file: what is wrong with them is an InputError."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"\s+", " ", message).strip()
        raise InputError(f"{self.prog}: {text}{self._suggestion(text)}")


def fail(message: str, *, prog: str, hint: str | None = None) -> NoReturn:
    """Print one line to standard error and exit with status 2."""
    line = " ".join(message.split())
    print(f"{prog}: error: {line}" + (f" ({hint})" if hint else ""), file=sys.stderr)
    sys.exit(2)


def parse_run(args: list[str], prog: str, default_config: Path | None = None) -> Callable[[], RunConfig]:
    """Parse a run's flags (syntax, names and types: exit status 2); what is returned builds the configuration and checks it."""
    return _parse(_run_parser(prog, default_config), args, default_config)[1]


def parse_run_and(
    args: list[str], prog: str, *, description: str, add_flags: Callable[[Parser], None]
) -> tuple[Any, Callable[[], RunConfig]]:
    """As `parse_run`, for a command that has flags of its own besides the run's; returns all values, and what `parse_run` does."""
    parser = _run_parser(prog, None, description)
    add_flags(parser)
    return _parse(parser, args, None)


def parse_file_into(kind: type[C], args: list[str], prog: str, *, description: str) -> Callable[[], C]:
    """As `parse_run`, for a command whose file and flags are those of another configuration, the dataclass `kind`."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --config FILE [--KEY VALUE ...]",
        description=f"{description} Every key of a config file is a flag too, and a flag wins.",
        exit_on_error=True,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(kind)
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
    """`args` without the flags of keys inside the mappings `names`, and these: (path, value).

    The parser would put `--base.training.num_steps 6` in the place of all of base.training.
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
    args = _bare_switches(args)
    if default_config and not any(arg == "--config" or arg.startswith("--config=") for arg in args):
        args = ["--config", str(default_config), *args]
    _check_yaml(args, parser.prog)
    values = parser.parse_args(args)
    return values, lambda: _build(parser, values)


def read_config(path: Path) -> RunConfig:
    """The configuration in the YAML file at `path`.

    Raises:
        InputError: where there is no such file; a file with wrong keys exits with status 2.
    """
    if not path.is_file():
        raise InputError(f"no {path.name} in '{path.parent}': it is not a run's directory")
    parser = _run_parser(str(path), None)
    return _build(parser, parser.parse_args(["--config", str(path)]))


def run_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration with these nested keys, as in a YAML file.

    Raises:
        InputError: for a key or a value that a run's configuration cannot have; `where` says whose it is.
    """
    parser = _ValuesParser(prog=where)
    parser.add_class_arguments(RunConfig)
    return _build(parser, parser.parse_object(dict(values)))


def directory_of(config: RunConfig) -> Path:
    """Where a run's files are."""
    return Path(config.output_dir) / config.run_name


def write_config(config: RunConfig, path: Path) -> None:
    """Write `config` as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True))


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The keys in which two configurations differ, each as `key: old, now new`."""
    before, after = _flat(resolved(old)), _flat(resolved(new))
    return [f"{key}: {before[key]}, now {after[key]}" for key in before if before[key] != after[key]]


def resolved(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, ready for YAML, without what is a wish of one call and not of the run.

    That is `resume`, where this machine keeps compiled programs, and the processes it is spread over: what many hosts saved,
    one may resume.
    """
    values = asdict(config)
    for key in ("resume", "compilation_cache", "distributed", "cluster"):
        del values[key]
    return values


def _run_parser(prog: str, default_config: Path | None, description: str = _TRAINS) -> Parser:
    default = f" Without --config: {default_config.parent.name}/{default_config.name}." if default_config else ""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config FILE] [--KEY VALUE ...]",
        description=f"{description} Every key of a config file is a flag too, and a flag wins." + default,
        exit_on_error=True,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below.")
    parser.add_class_arguments(RunConfig)
    return parser


def _build(parser: Parser, values: Any) -> RunConfig:
    instantiated = parser.instantiate(values)
    return RunConfig(**{field.name: instantiated[field.name] for field in fields(RunConfig)})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _check_yaml(args: list[str], prog: str) -> None:
    """Name the file that is no YAML: jsonargparse says only where in it."""
    for i, arg in enumerate(args):
        named = arg.partition("=")[2] if arg.startswith("--config=") else arg if args[i - 1 : i] == ["--config"] else ""
        path = Path(named)
        try:
            yaml.safe_load(path.read_text() if path.is_file() else "")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            fail(f"{path} is not YAML: {error}", prog=prog)


def _bare_switches(args: list[str]) -> list[str]:
    """`--resume` alone means `--resume=true`, and so does `--distributed`."""
    switches = ("--resume", "--distributed")
    return [
        f"{arg}=true" if arg in switches and args[i + 1 : i + 2] not in (["true"], ["false"]) else arg
        for i, arg in enumerate(args)
    ]
