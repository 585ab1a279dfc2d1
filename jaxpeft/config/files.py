"""Configurations in YAML files, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from jaxpeft.config.parsing import ValuesParser, build_run, run_parser
from jaxpeft.config.run import RunConfig
from jaxpeft.errors import InputError


def read_config(path: Path) -> RunConfig:
    """The configuration in the YAML file at `path`.

    Raises:
        InputError: where there is no such file; a file with wrong keys exits with status 2.
    """
    if not path.is_file():
        raise InputError(f"no {path.name} in '{path.parent}': it is not a run's directory")
    parser = run_parser(str(path), None)
    return build_run(parser, parser.parse_args(["--config", str(path)]))


def run_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration with these nested keys, as in a YAML file.

    Raises:
        InputError: for a key or a value that a run's configuration cannot have; `where` says whose it is.
    """
    parser = ValuesParser(prog=where)
    parser.add_class_arguments(RunConfig)
    return build_run(parser, parser.parse_object(dict(values)))


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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
