"""The frozen base in 4 or 8 bits: NF4 and FP4, with double quantisation or without, and int8. Pure functions over pytrees."""

from jaxpeft.quantization.codebooks import CODEBOOKS, FP4_VALUES, NF4_VALUES
from jaxpeft.quantization.four_bit import BLOCK_SIZES, FourBitTensor
from jaxpeft.quantization.int8 import Int8Tensor
from jaxpeft.quantization.recompute import recomputed
from jaxpeft.quantization.scheme import (
    DATA_TYPES,
    Quantization,
    QuantizedTensor,
    dequantize,
    is_quantized,
    quantize,
    quantize_like,
    quantized_shape,
)

__all__ = [
    "BLOCK_SIZES",
    "CODEBOOKS",
    "DATA_TYPES",
    "FP4_VALUES",
    "NF4_VALUES",
    "FourBitTensor",
    "Int8Tensor",
    "Quantization",
    "QuantizedTensor",
    "dequantize",
    "is_quantized",
    "quantize",
    "quantize_like",
    "quantized_shape",
    "recomputed",
]
