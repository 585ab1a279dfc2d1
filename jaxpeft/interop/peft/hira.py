"""HIRA in PEFT's files: names without `.weight`, and no alpha.

PEFT 0.21 writes `rank_pattern` into the config but builds every layer with `r` (`dispatch_default` in its hira/layer.py). So an
adapter of several ranks is written at the largest rank and padded with zeros, which changes no product A·B. When a file is read, a
pattern that contradicts the tensors is dropped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jaxpeft.adapters import Hira
from jaxpeft.interop.peft.format import Config, Format
from jaxpeft.trees import Layers


class HiraFormat(Format):
    """`hira_A` and `hira_B`."""

    peft_type = "HIRA"
    keys = {"hira_A": "a", "hira_B": "b"}  # noqa: RUF012
    embedding_keys = {"hira_embedding_A": "a", "hira_embedding_B": "b"}  # noqa: RUF012

    def to_config(self, method: Hira) -> dict[str, Any]:
        """The method's keys in adapter_config.json."""
        return {
            "r": method.rank,
            "hira_dropout": method.dropout,
            "rank_pattern": dict(method.rank_pattern),
            "init_weights": method.init_weights,
            "fan_in_fan_out": False,
        }

    def exported(self, method: Hira, sites: Layers, start: Layers | None) -> tuple[Hira, Layers]:
        """All layers padded to the largest rank."""
        ranks = {params["a"].shape[1] for params in sites.values()}
        if not method.rank_pattern or not ranks:
            return method, sites
        rank = max(ranks)
        filled = {
            path: {
                "a": jnp.pad(params["a"], ((0, 0), (0, rank - params["a"].shape[1]))),
                "b": jnp.pad(params["b"], ((0, rank - params["b"].shape[0]), (0, 0))),
            }
            for path, params in sites.items()
        }
        return replace(method, rank=rank, rank_pattern={}), filled

    def settled(self, method: Hira, sites: Layers) -> Hira:
        """The method without `rank_pattern` if every layer has the rank r."""
        same = all(params["a"].shape[-1:] == (method.rank,) for params in sites.values() if "a" in params)
        return replace(method, rank_pattern={}) if same else method

    def from_config(self, config: Config) -> Hira:
        """A missing key has PEFT's default."""
        start = config.get("init_weights", True)
        return Hira(
            rank=config.get("r", 32),
            dropout=config.get("hira_dropout", 0.0),
            rank_pattern=config.get("rank_pattern") or {},
            init_weights=True if start is None else start,
        )
