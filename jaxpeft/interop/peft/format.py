"""What PEFT's files say of one method: its config's keys, and its tensors' names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxpeft.adapters import Method
from jaxpeft.errors import InputError
from jaxpeft.families.base import Family
from jaxpeft.trees import Layers

Config = Mapping[str, Any]
"""An `adapter_config.json`."""

NO_TARGETS = "dummy-target-modules"
"""PEFT's `target_modules` for an adapter of no layer."""


class Format(ABC):
    """One `peft_type`. Tensors are stored as the transposes of ours, so a format is names only.

    Attributes:
        peft_type: PEFT's name of the method, such as "LORA".
        method: our class of it.
        keys: PEFT's key behind a linear layer's name → our parameter.
        embedding_keys: the same for an embedding.
        shared_keys: whole key of what all layers share → our name of it.
        alone_keys: whole key → our parameter, where a method has one site whose layer the file does not name.
        module_infix: what stands in the key between a layer's name and the leaf where the method itself trains the leaf whole.
        module_prefix: what stands in front of every name of the base's.
        names_layers: whether the config has target_modules; where it has not, it says the base's sizes instead.
        unsupported: options that change what the adapter computes and that we do not → the value that switches them off.
    """

    peft_type: ClassVar[str]
    method: ClassVar[type[Method]]
    keys: ClassVar[Mapping[str, str]] = {}
    embedding_keys: ClassVar[Mapping[str, str]] = {}
    shared_keys: ClassVar[Mapping[str, str]] = {}
    alone_keys: ClassVar[Mapping[str, str]] = {}
    module_infix: ClassVar[str] = ""
    module_prefix: ClassVar[str] = "base_model.model."
    names_layers: ClassVar[bool] = True
    unsupported: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def to_config(self, method: Any) -> dict[str, Any]:
        """PEFT's options for `method`."""

    @abstractmethod
    def from_config(self, config: Config) -> Method:
        """The method that `config` describes; an absent key has PEFT's default."""

    def for_family(self, method: Any, family: Family) -> Any:
        """Return `method` with layers named that PEFT must be told of and that depend on the base's architecture.

        Raises:
            InputError: if the family does not say what they are called.
        """
        return method

    def exported(self, method: Any, sites: Layers, start: Layers | None) -> tuple[Any, Layers]:
        """The method and the sites' parameters as PEFT can hold them, where that is not as they are.

        `start` is the fresh adapter, where the caller has it.
        """
        return method, sites

    def settled(self, method: Any, sites: Layers) -> Method:
        """The method that a file holds, after a look at its tensors."""
        return method

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """The whole `config` as PEFT takes it, where an option must fit the target_modules.

        `layers` are the full dotted names of the adapted layers.
        """
        return config

    def reads(self, peft_type: str, config: Config) -> bool:
        """Whether a file of `peft_type` with `config` is of this format."""
        return peft_type.upper() == self.peft_type

    def check(self, config: Config, file: str) -> None:
        """Raise InputError for an option that is set and not supported."""
        for option, plain in self.unsupported.items():
            if config.get(option, plain) not in (plain, None):
                raise InputError(f"{file}: {option}={config[option]!r} is not supported")
