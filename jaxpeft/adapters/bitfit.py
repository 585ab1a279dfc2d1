"""BitFit: of the base nothing but its biases trains (Ben Zaken et al. 2021, arXiv 2106.10199, section 3).

As in the paper a classifier's head trains besides (what a run trains whole, `prepare.fully_trained`). PEFT has no BitFit of its
own: there it is LoRA with bias="all" and no layer to adapt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.adapters.base import Method


@dataclass(frozen=True)
class BitFit(Method):
    """All biases train: of the linear layers, of the layer norms, and of a masked-LM head."""

    name: ClassVar[str] = "bitfit"

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """Every leaf that is called `bias`."""
        return {leaf for leaf in leaves if leaf.rpartition("/")[2] == "bias"}
