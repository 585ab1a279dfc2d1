"""Read and write configurations as YAML, and compare two of them."""

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
    """Read the configuration in the YAML file at `path`. Wrong keys exit with status 2.

    Raises:
        InputError: the file does not exist, or its values cannot be combined.
    """
    if not path.is_file():
        raise InputError(f"no {path.name} in '{path.parent}': it is not a run's directory")
    parser = run_parser(str(path), None)
    return build_run(parser, parser.parse_args(["--config", str(path)]))


def run_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """The configuration with the nested keys of `values`, as in a YAML file.

    Raises:
        InputError: a key or a value is invalid. The message names its origin, `where`.
    """
    parser = ValuesParser(prog=where)
    parser.add_class_arguments(RunConfig)
    return build_run(parser, parser.parse_object(dict(values)))


def directory_of(config: RunConfig) -> Path:
    """The directory of a run's files: output_dir/name."""
    return Path(config.output_dir) / config.run_name


def write_config(config: RunConfig, path: Path) -> None:
    """Write `config` as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(resolved(config), sort_keys=False, allow_unicode=True))


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The keys that differ between two configurations, each as `key: old, now new`."""
    before, after = _flat(resolved(old)), _flat(resolved(new))
    return [f"{key}: {before[key]}, now {after[key]}" for key in before if before[key] != after[key]]


def resolved(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain values, ready for YAML, without the keys that belong to one call and not to the run.

    These are `resume`, the directory of compiled programs, and the processes: one host may resume a run of many hosts.
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
