"""The options that LOHA and LOKR share in PEFT's configs."""

from __future__ import annotations

from typing import Any

from jaxpeft.adapters.lycoris import Lycoris
from jaxpeft.interop.peft.format import Config


def to_options(method: Lycoris) -> dict[str, Any]:
    """PEFT's common options of the LyCORIS methods. PEFT has one more, for convolutions, which are never adapted here."""
    return {
        "r": method.rank,
        "alpha": method.alpha,
        "rank_pattern": dict(method.rank_pattern),
        "alpha_pattern": dict(method.alpha_pattern),
        "rank_dropout": method.rank_dropout,
        "module_dropout": method.module_dropout,
        "use_effective_conv2d": False,
    }


def from_options(config: Config) -> dict[str, Any]:
    """Arguments of the method; a missing key has PEFT's default."""
    return {
        "rank": config.get("r", 8),
        "alpha": config.get("alpha", 8),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
        "rank_dropout": config.get("rank_dropout", 0.0),
        "module_dropout": config.get("module_dropout", 0.0),
    }
