"""Tables of what there is of one kind: a method, a task, a number format. A new one is a file and a line in its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from jaxpeft.errors import InputError, did_you_mean


class Registry(Mapping[str, Any]):
    """Name → object, imported at its first use: reading the names loads nothing.

    METHODS = Registry("adapter method", {"lora": "jaxpeft.adapters.lora:Lora"})
    METHODS["lora"]   # imports jaxpeft.adapters.lora, returns the class
    METHODS["lroa"]   # InputError: there is no adapter method 'lroa'; did you mean 'lora'?
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        """`kind` names one of them in messages; `places` are `module:attribute` by name."""
        self._kind, self._places = kind, dict(places)

    def __getitem__(self, name: str) -> Any:
        """The object called `name`.

        Raises:
            InputError: if there is none, with the names there are.
        """
        self.check(name)
        module, _, attribute = self._places[name].partition(":")
        return getattr(import_module(module), attribute)

    def check(self, name: str) -> None:
        """Refuse an unknown `name` without importing anything: a configuration is checked before jax is loaded.

        Raises:
            InputError: as `registry[name]`.
        """
        if name not in self._places:
            hint = did_you_mean(name, self._places) or f"; choose from {', '.join(self._places)}"
            raise InputError(f"there is no {self._kind} '{name}'{hint}")

    def get(self, name: str, default: Any = None) -> Any:  # a Mapping's expects KeyError
        """The object called `name`, or `default`."""
        return self[name] if name in self else default  # noqa: SIM401

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
