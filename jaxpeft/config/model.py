"""Flags of the frozen base model: `--model.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub id, local directory, package:module/folder, or a config.json (with weights: random)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Load the checkpoint, or draw every weight at random from the bare config."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer; null: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in and frozen matrices are stored in; what trains stays float32. bfloat16 pays on GPU and TPU."""
    dropout: float | None = None
    """Rate of every dropout in the base while training, 0 to 1; null: the checkpoint's own. A short run is better off with 0."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Store the encoder's linear layers in 4-bit NormalFloat (QLoRA), 4-bit floats or int8; none: as the checkpoint holds them."""
    quantization_block_size: int = 64
    """Weights that share one scale in 4 bits, a power of two from 64 to 4096; int8 has a scale per output channel."""
    double_quantization: bool = True
    """Store the scales of 4-bit weights in 8 bits too (4.13 bits a weight instead of 4.5)."""
    attention: Literal["auto", "dense", "flash"] = "auto"
    """Scores in memory or in tiles (flash: GPU, TPU; bfloat16; no dropout); auto: flash where it can be had and pays."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""
