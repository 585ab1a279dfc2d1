"""The frozen base in 4 bits: NF4 with double quantisation (QLoRA). Pure functions over pytrees; knows no models."""

from jaxpeft.quant.nf4 import BLOCK_SIZES, NF4_VALUES, Nf4Tensor, dequantize, quantize

__all__ = ["BLOCK_SIZES", "NF4_VALUES", "Nf4Tensor", "dequantize", "quantize"]
