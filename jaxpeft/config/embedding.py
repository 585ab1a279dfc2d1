"""Flags of sentence embeddings: `--embedding.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EmbeddingConfig:
    """How a text becomes a vector, and how similar texts are pulled together (task sentence-embeddings)."""

    pooling: Literal["mean", "cls"] = "mean"
    """The embedding of a text: the mean of its tokens' vectors, or the vector of its first token."""
    scale: float = 20.0
    """Factor of the cosines in the loss, the inverse of the temperature: 20 is a temperature of 0.05."""
    normalize: bool = True
    """Embeddings of predict and of the exported model have length 1; false: as they are pooled. The loss is the same."""
