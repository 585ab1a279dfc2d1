"""The frozen base in 4 or 8 bits: NF4 and FP4, with double quantisation or without, and int8. Pure functions over pytrees."""

from jaxpeft.quant.codebooks import CODEBOOKS, FP4_VALUES, NF4_VALUES
from jaxpeft.quant.four_bit import BLOCK_SIZES, FourBitTensor
from jaxpeft.quant.int8 import Int8Tensor
from jaxpeft.quant.recompute import recomputed
from jaxpeft.quant.scheme import (
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
