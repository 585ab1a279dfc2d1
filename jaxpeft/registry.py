"""Tables of all things of one kind: adapter methods, tasks, number formats. A new one is one file and one line in its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from jaxpeft.errors import InputError, did_you_mean


class Registry(Mapping[str, Any]):
    """A mapping from names to objects, each imported at its first use. Reading the names imports nothing.

    METHODS = Registry("adapter method", {"lora": "jaxpeft.adapters.lora:Lora"})
    METHODS["lora"]   # imports jaxpeft.adapters.lora, returns the class
    METHODS["lroa"]   # InputError: there is no adapter method 'lroa'; did you mean 'lora'?
    """

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        """`kind` is the word for one object in messages; `places` maps a name to `module:attribute`."""
        self._kind, self._places = kind, dict(places)

    def __getitem__(self, name: str) -> Any:
        """The object called `name`.

        Raises:
            InputError: there is none. The message has near names, or else all names.
        """
        self.check(name)
        module, _, attribute = self._places[name].partition(":")
        return getattr(import_module(module), attribute)

    def check(self, name: str) -> None:
        """Check that `name` is known without importing anything, because a configuration is checked before jax is loaded.

        Raises:
            InputError: as `registry[name]`.
        """
        if name not in self._places:
            hint = did_you_mean(name, self._places) or f"; choose from {', '.join(self._places)}"
            raise InputError(f"there is no {self._kind} '{name}'{hint}")

    def get(self, name: str, default: Any = None) -> Any:  # Mapping.get catches only KeyError
        """The object called `name`, or `default` if there is none."""
        return self[name] if name in self else default  # noqa: SIM401

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
