"""BitFit: only the biases of the base train (Ben Zaken et al. 2021, arXiv 2106.10199, section 3).

As in the paper, a new classifier head trains too; the run adds it, not this method. PEFT has no BitFit of its own: its file
is a LoRA with bias="all" that adapts no layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.adapters.base import Description, Method


@dataclass(frozen=True)
class BitFit(Method):
    """All biases train: those of the linear layers, of the layer norms, and of a masked-LM head."""

    name: ClassVar[str] = "bitfit"
    description: ClassVar[Description] = Description(
        title="BitFit",
        equation="the biases train",
        source="Ben Zaken et al. 2021, arXiv 2106.10199",
        advice="a baseline that costs nothing at inference",
        peft="`LORA` without layers, `bias=all`",
    )

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """Every leaf named `bias`."""
        return {leaf for leaf in leaves if leaf.rpartition("/")[2] == "bias"}
