"""Read and write configurations as YAML, and compare two of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxpeft.config.parsing import build_run, run_values_parser
from jaxpeft.config.run import RunConfig
from jaxpeft.errors import InputError, fail

TOKEN_CACHE = "data.token_cache"


def read_config(path: Path) -> RunConfig:
    """Read the configuration in the YAML file at `path`. Wrong keys exit with status 2.

    Raises:
        InputError: the file does not exist, or its values cannot be combined.
    """
    if not path.is_file():
        raise InputError(f"no {path.name} in '{path.parent}': it is not a run's directory")
    parser = run_values_parser()
    try:
        values = parser.parse_args(["--config", str(path)])
    except InputError as error:
        fail(str(error), prog=str(path))
    return build_run(parser, values)


def run_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration with the nested keys of `values`, as in a YAML file.

    Raises:
        InputError: a key or a value is invalid. The message names its origin, `where`.
    """
    parser = run_values_parser()
    try:
        parsed = parser.parse_object(dict(values))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return build_run(parser, parsed)


def write_config(values: Mapping[str, Any], path: Path) -> None:
    """Write the `resolved()` values of a configuration to `path`, as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys that differ between the `resolved()` values of two configurations, each as `key: old, now new`.

    The place of the token cache is left out, because it changes no result.
    """
    before, after = flat(old), flat(new)
    keys = [key for key in before if key != TOKEN_CACHE]
    return [f"{key}: {before[key]}, now {after[key]}" for key in keys if before[key] != after[key]]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
