"""The settings of contextual sparsity: a share of the channels for each encoder layer, and how channels are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from jaxpeft.errors import InputError, check_choice

Selection = Literal["svd", "oracle", "random"]
"""How channels are chosen: by the estimators; by their true norms, which is as expensive as the dense product; at random."""


@dataclass(frozen=True)
class ContextualSparsity:
    """The channels that a training step leaves out.

    Attributes:
        feed_forward: for each encoder layer the share of its feed-forward channels, from 0 to below 1.
        attention: for each encoder layer the share of the channels of queries and keys (one choice) and of values and the
            attention output (another one).
        selection: how channels are chosen.
        dense_tokens: True: the tokens that the loss reads use every channel.
    """

    feed_forward: tuple[float, ...]
    attention: tuple[float, ...]
    selection: Selection = "svd"
    dense_tokens: bool = True

    def __post_init__(self) -> None:
        """Refuse a share that is out of range and an unknown selection."""
        check_choice("selection", self.selection, get_args(Selection))
        for share in (*self.feed_forward, *self.attention):
            if not 0 <= share < 1:
                raise InputError(f"a sparsity is {share}; it must be at least 0 and below 1")

    @property
    def sparse_layers(self) -> list[int]:
        """The encoder layers that leave channels out, by number."""
        shares = zip(self.attention, self.feed_forward, strict=True)
        return [number for number, pair in enumerate(shares) if any(pair)]


def per_layer(value: float | Sequence[float], num_layers: int, option: str) -> tuple[float, ...]:
    """`value` for each of `num_layers` encoder layers: one number for all, or a list with one number per layer.

    Raises:
        InputError: the list has another length.
    """
    if isinstance(value, int | float):
        return (float(value),) * num_layers
    if len(value) != num_layers:
        raise InputError(
            f"{option} has {len(value)} values, and the model has {num_layers} layers; give one number, or one per layer"
        )
    return tuple(map(float, value))
