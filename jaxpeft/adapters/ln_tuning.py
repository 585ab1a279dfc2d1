"""LN tuning: only the scale and bias of the layer norms train (Zhao et al. 2023, arXiv 2312.11420, section 3).

The paper tunes the norms of a language model for images; PEFT does so for any transformer. PEFT has no default for the BERTs and
must be told the names (`LayerNorm`; in DistilBERT also `sa_layer_norm` and `output_layer_norm`). Here the default is every norm,
including those of the embeddings and of a masked-LM head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.adapters.base import Description, Method
from jaxpeft.errors import InputError, did_you_mean


@dataclass(frozen=True)
class LnTuning(Method):
    """The layer norms train.

    Attributes:
        target_modules: None selects every layer that has a scale. A list matches a norm's dotted name exactly or by its end after a
            dot; a string is a regular expression for the whole name.
        exclude_modules: norms that do not train, in the same forms.
    """

    name: ClassVar[str] = "ln-tuning"
    description: ClassVar[Description] = Description(
        title="LN tuning",
        equation="the layer norms' scales and biases train",
        source="Zhao et al. 2023, arXiv 2312.11420",
        advice="a baseline; often enough to move to a new domain",
        peft="`LN_TUNING`",
    )
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None

    def fully_trained(self, leaves: Iterable[str], adapted_layers: Iterable[str]) -> set[str]:
        """The scale and the bias of every selected norm.

        Raises:
            InputError: if a name matches no layer norm, or no norm is left.
        """
        leaves = list(leaves)
        norms = {leaf.removesuffix("/scale").replace("/", ".") for leaf in leaves if leaf.endswith("/scale")}
        named = set() if self.target_modules is None else _entries(self.target_modules)
        ends = {norm.rpartition(".")[2] for norm in norms}
        for entry in named:
            if not any(_matches(norm, entry) for norm in norms):
                text = entry if isinstance(entry, str) else entry[0]
                raise InputError(
                    f"target_modules '{text}' matches no layer norm{did_you_mean(text, ends)}; the norms end in {', '.join(sorted(ends))}"
                )
        chosen = {norm for norm in norms if self.target_modules is None or _matches(norm, self.target_modules)}
        chosen -= {norm for norm in norms if self.exclude_modules and _matches(norm, self.exclude_modules)}
        if not chosen:
            raise InputError(
                f"target_modules {self.target_modules!r} without exclude_modules {self.exclude_modules!r} leaves no layer "
                f"norm to tune; the norms end in {', '.join(sorted(ends))}"
            )
        return {leaf for leaf in leaves if leaf.rpartition("/")[0].replace("/", ".") in chosen}


def _entries(names: str | Sequence[str]) -> set[str | tuple[str]]:
    """The entries that must each match a norm: the regular expression, or every name of the list."""
    return {names} if isinstance(names, str) else {(name,) for name in names}


def _matches(norm: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, norm) is not None
    return any(norm == name or norm.endswith(f".{name}") for name in names)
