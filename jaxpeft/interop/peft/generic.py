"""The format of a method, or of an option of one, that PEFT does not have. The files look like PEFT's, and only jaxpeft loads them.

`adapter_config.json` has the peft_type "JAXPEFT_<NAME>", which PEFT refuses, and the method's options under "jaxpeft_options".
The tensors have our parameter names: `base_model.model.<layer>.jaxpeft.<parameter>`, and `base_model.jaxpeft.<factor>` for a factor
that all layers share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from jaxpeft.adapters import METHODS, Method
from jaxpeft.adapters.build import checked_options
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.format import Config, Format

PREFIX = "JAXPEFT_"
OPTIONS = "jaxpeft_options"

_MARK = "jaxpeft."
_SHARED = f"base_model.{_MARK}"


class GenericFormat(Format):
    """Our parameter names as they are. `keys` and `shared_keys` follow from the parameters that an adapter has."""

    def __init__(self, method_name: str, parameters: Iterable[str] = (), factors: Iterable[str] = ()) -> None:
        """The format of the method called `method_name` with these `parameters` at its sites and these shared `factors`."""
        self.method_name = method_name
        self.peft_type = _peft_type(method_name)
        self.keys = self.embedding_keys = {f"{_MARK}{name}": name for name in parameters}
        self.shared_keys = {f"{_SHARED}{name}": name for name in factors}

    @classmethod
    def named(cls, peft_type: str) -> GenericFormat:
        """The format of a file with this `peft_type`.

        Raises:
            InputError: if no method has it.
        """
        for name in METHODS:
            if _peft_type(name) == peft_type:
                return cls(name)
        raise InputError(
            f"peft_type {peft_type!r} belongs to a method that is not in jaxpeft.adapters.METHODS: add its line, or use the "
            "version of jaxpeft that wrote the file"
        )

    def with_tensors(self, keys: Iterable[str]) -> GenericFormat:
        """With the parameters and factors that the `keys` of a file name."""
        keys = list(keys)
        factors = [key.removeprefix(_SHARED) for key in keys if key.startswith(_SHARED)]
        parameters = {
            key.rpartition(f".{_MARK}")[2] for key in keys if f".{_MARK}" in key and not key.startswith(_SHARED)
        }
        return GenericFormat(self.method_name, sorted(parameters), factors)

    def to_config(self, method: Any) -> dict[str, Any]:
        """All options of the method.

        Raises:
            InputError: if an option has a value that JSON cannot hold.
        """
        options = {option.name: _plain(getattr(method, option.name)) for option in fields(method)}
        for name, value in options.items():
            try:
                json.dumps(value)
            except TypeError as error:
                raise InputError(f"{name} of {method.name} is {value!r}, which JSON cannot hold") from error
        return {OPTIONS: options}

    def from_config(self, config: Config) -> Method:
        """The method with the file's options.

        Raises:
            InputError: if the method lacks one of them, or one that has no default is missing.
        """
        kind: Any = METHODS[self.method_name]
        options = checked_options(kind, config.get(OPTIONS) or {}, OPTIONS)
        for option in fields(kind):
            if option.default is MISSING and option.default_factory is MISSING and option.name not in options:
                raise InputError(f"{OPTIONS} lacks '{option.name}', which {self.method_name} needs")
        method: Method = kind(**options)
        return method


def _peft_type(method_name: str) -> str:
    return PREFIX + method_name.upper().replace("-", "_")


def _plain(value: Any) -> Any:
    """`value` as JSON has it: a mapping as a dictionary."""
    return dict(value) if isinstance(value, Mapping) else value
