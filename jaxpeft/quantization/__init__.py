"""The frozen base in 4 or 8 bits: NF4 and FP4, with or without double quantisation, and int8. Pure functions over pytrees.

Nothing is imported before its first use: the configuration reads the names of the table, and must not load jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from jaxpeft.registry import Registry

if TYPE_CHECKING:
    from jaxpeft.quantization.base import NumberFormat as NumberFormat
    from jaxpeft.quantization.base import Quantization as Quantization
    from jaxpeft.quantization.base import QuantizedTensor as QuantizedTensor
    from jaxpeft.quantization.convert import dequantize as dequantize
    from jaxpeft.quantization.convert import is_quantized as is_quantized
    from jaxpeft.quantization.convert import quantize as quantize
    from jaxpeft.quantization.convert import quantize_like as quantize_like
    from jaxpeft.quantization.convert import quantized_shape as quantized_shape
    from jaxpeft.quantization.four_bit import BLOCK_SIZES as BLOCK_SIZES
    from jaxpeft.quantization.four_bit import FourBitTensor as FourBitTensor
    from jaxpeft.quantization.int8 import Int8Tensor as Int8Tensor
    from jaxpeft.quantization.recompute import recomputed as recomputed

NUMBER_FORMATS = Registry(
    "number format",
    {
        "nf4": "jaxpeft.quantization.nf4:NF4",
        "fp4": "jaxpeft.quantization.fp4:FP4",
        "int8": "jaxpeft.quantization.int8:INT8",
    },
)
"""`--model.quantization` → an object that implements `NumberFormat`."""

_PUBLIC = {
    "BLOCK_SIZES": "four_bit",
    "FourBitTensor": "four_bit",
    "Int8Tensor": "int8",
    "NumberFormat": "base",
    "Quantization": "base",
    "QuantizedTensor": "base",
    "dequantize": "convert",
    "is_quantized": "convert",
    "quantize": "convert",
    "quantize_like": "convert",
    "quantized_shape": "convert",
    "recomputed": "recompute",
}


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
