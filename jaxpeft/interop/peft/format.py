"""The contract of a file format: the keys of the config and the names of the tensors, for one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax

from jaxpeft.adapters import Method, Site
from jaxpeft.errors import InputError
from jaxpeft.families.base import Family
from jaxpeft.trees import Layers

Config = Mapping[str, Any]
"""An `adapter_config.json`."""


NO_TARGETS = "dummy-target-modules"
"""PEFT's `target_modules` for an adapter of no layer."""


class Format(ABC):
    """One `peft_type`. Tensors are stored as the transposes of ours, so a format is mostly names.

    Attributes:
        peft_type: PEFT's name of the method, such as "LORA".
        keys: PEFT's key after the name of a linear layer → our parameter.
        embedding_keys: the same for an embedding.
        shared_keys: whole key of a factor that all layers share → our name of it.
        alone_keys: whole key → our parameter, if the method has one site and the file does not name its layer.
        module_infix: part of a key between a layer's name and the leaf, for leaves that the method itself trains fully.
        module_prefix: prefix of every name of the base's parameters.
        names_layers: True if the config has target_modules; if not, it has the base's sizes instead.
        unsupported: options that change the result and that jaxpeft does not have → the value that switches them off.
    """

    peft_type: str
    keys: Mapping[str, str] = {}
    embedding_keys: Mapping[str, str] = {}
    shared_keys: Mapping[str, str] = {}
    alone_keys: ClassVar[Mapping[str, str]] = {}
    module_infix: ClassVar[str] = ""
    module_prefix: ClassVar[str] = "base_model.model."
    names_layers: ClassVar[bool] = True
    unsupported: ClassVar[Mapping[str, Any]] = {}

    def holds(self, method: Any) -> bool:
        """True if PEFT can compute `method`. If not, its file is jaxpeft's own (`generic.py`)."""
        return True

    @abstractmethod
    def to_config(self, method: Any) -> dict[str, Any]:
        """The keys of `method` in adapter_config.json."""

    @abstractmethod
    def from_config(self, config: Config) -> Method:
        """The method that `config` describes; a missing key has PEFT's default."""

    def for_family(self, method: Any, family: Family) -> Any:
        """Return `method` with layers named that PEFT must be told of and that depend on the base's architecture.

        Raises:
            InputError: if the family does not say what they are called.
        """
        return method

    def exported(self, method: Any, sites: Layers, start: Layers | None) -> tuple[Any, Layers]:
        """The method and the sites' parameters in a form that PEFT can hold.

        `start` is the initial adapter, if the caller has it.
        """
        return method, sites

    def with_constants(
        self, method: Any, sites: Layers, constants: Layers, targets: Mapping[str, Site]
    ) -> tuple[Any, Layers]:
        """The method and the sites' tensors with the constants of their layers (`HasConstants`) in a form that PEFT can hold.

        `targets` are the layers. Like all tensors of ours, those returned are the transposes of the file's.
        """
        return method, {path: {**params, **constants[path]} for path, params in sites.items()}

    def read_constant(self, name: str, tensor: jax.Array, site: Site) -> jax.Array:
        """The constant called `name` from the transpose of a file's tensor.

        Raises:
            InputError: if the tensor has no shape of this format.
        """
        return tensor

    def settled(self, method: Any, sites: Layers) -> Method:
        """The method of a file, corrected by its tensors."""
        return method

    def with_tensors(self, keys: Iterable[str]) -> Format:
        """The format of a file that has tensors of these `keys`."""
        return self

    def beside_targets(self, config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
        """The whole `config`, changed if PEFT demands that an option fits the target_modules.

        `layers` are the full dotted names of the adapted layers.
        """
        return config

    def reads(self, peft_type: str, config: Config) -> bool:
        """True if this format reads a file of `peft_type` with `config`."""
        return peft_type.upper() == self.peft_type

    def check(self, config: Config, file: str) -> None:
        """Raise InputError if an unsupported option is set."""
        for option, plain in self.unsupported.items():
            if config.get(option, plain) not in (plain, None):
                raise InputError(f"{file}: {option}={config[option]!r} is not supported")


def without_exclude_modules(config: dict[str, Any], layers: list[str]) -> dict[str, Any]:
    """`config` for a method whose PEFT config lacks exclude_modules. If modules are excluded, it names the adapted `layers` in full."""
    rest = {key: value for key, value in config.items() if key != "exclude_modules"}
    return {**rest, "target_modules": layers} if config["exclude_modules"] else rest
