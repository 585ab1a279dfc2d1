"""Adapter methods: one file each, on one contract. The baselines "full" and "head" have no method: whole leaves train."""

from jaxpeft.adapters.contract import FrozenLinear, Method, Site
from jaxpeft.adapters.hira import Hira
from jaxpeft.adapters.lora import Lora

METHODS: dict[str, type[Method]] = {"lora": Lora, "hira": Hira}

__all__ = ["METHODS", "FrozenLinear", "Hira", "Lora", "Method", "Site"]
