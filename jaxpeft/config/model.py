"""Flags of the frozen base model: `--model.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxpeft.quantization import NUMBER_FORMATS

# `--help` lists the names of the table. The test is negated, because jsonargparse executes the block of a plain
# `if TYPE_CHECKING` and would then accept any string.
if not TYPE_CHECKING:  # noqa: SIM108
    QuantizationName = Literal["none", *NUMBER_FORMATS]
else:
    QuantizationName = str


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub id, local directory, package:module/folder, or a config.json (with weights: random)."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """Load the checkpoint, or initialise every weight at random from the bare config."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer; null: the model's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the layers' arithmetic and of frozen matrices; trained parameters stay float32. bfloat16 pays on GPU and TPU."""
    dropout: float | None = None
    """Rate of every dropout in the base while training, 0 to 1; null: the checkpoint's own. 0 is better for short runs."""
    quantization: QuantizationName = "none"
    """Store the encoder's linear layers in 4-bit NormalFloat (nf4, QLoRA), 4-bit floats (fp4) or int8; none: as in the checkpoint."""
    quantization_block_size: int = 64
    """Weights that share one scale in 4 bits, a power of two from 64 to 4096; int8 has a scale per output channel."""
    double_quantization: bool = True
    """Also store the scales of 4-bit weights in 8 bits (4.13 bits a weight instead of 4.5)."""
    attention: Literal["auto", "dense", "flash"] = "auto"
    """Attention scores in memory (dense) or in tiles (flash: GPU, TPU; bfloat16; no dropout); auto: flash if it is faster."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        """Refuse a number format that is not in the table."""
        if self.quantization != "none":
            NUMBER_FORMATS.check(self.quantization)
