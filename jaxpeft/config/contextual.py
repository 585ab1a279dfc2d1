"""Flags of contextual sparsity, SparseLoRA: `--contextual.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ContextualConfig:
    """Channels of the frozen base that training leaves out, chosen for each batch (SparseLoRA, Khaki et al. 2025).

    It makes training faster, and evaluation stays dense. It is not the pruning of the adapter (`--pruning.*`).
    """

    ffn_sparsity: float | list[float] = 0.0
    """Share of the feed-forward channels to leave out, from 0 to below 1: one number for all layers, or one per layer ([0,0,0.9,0.9])."""
    qkv_sparsity: float | list[float] = 0.0
    """Share of the channels of queries and keys, and of values and the attention output, to leave out, in the same form."""
    selection: Literal["svd", "oracle", "random"] = "svd"
    """How channels are chosen: by estimates from an SVD of the weights; by their true norms (oracle: as slow as dense); at random."""
    estimator_rank: int = 8
    """Rank of the estimates."""
    dense_share: float = 0.05
    """Share of all steps, from the first, that are dense."""
    dense_tokens: bool = True
    """Use every channel for the tokens that the loss reads: the masked ones, or a classifier's first."""

    @property
    def is_on(self) -> bool:
        """True if any layer leaves anything out."""
        shares = (self.ffn_sparsity, self.qkv_sparsity)
        return any(any(share) if isinstance(share, list) else share for share in shares)
