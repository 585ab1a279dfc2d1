"""The contract of the number formats, and of the tensors that they make of a Flax kernel `[in, out]`.

A new format is an object that implements `NumberFormat`, with its tensor, in a file of its own, and a line in
`jaxpeft.quantization.NUMBER_FORMATS`. It can be trained on at once. Writing it to files is another matter: only the
formats of bitsandbytes have any (`jaxpeft.models.quantized_files`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import jax
import numpy as np

from jaxpeft.quantization import NUMBER_FORMATS


@dataclass(frozen=True)
class Quantization:
    """How frozen linear kernels are stored. `str` gives it in words, equal for schemes that store the same.

    Attributes:
        data_type: a name in `NUMBER_FORMATS`.
        block_size: weights per scale, one of `BLOCK_SIZES`. Formats without blocks ignore it.
        double_quantization: True: the scales of the blocks are held in 8 bits too. Formats without blocks ignore it.
    """

    data_type: str = "nf4"
    block_size: int = 64
    double_quantization: bool = True

    def __str__(self) -> str:
        number_format: NumberFormat = NUMBER_FORMATS[self.data_type]
        return number_format.in_words(self)

    @staticmethod
    def of(tensor: QuantizedTensor) -> Quantization:
        """The scheme in which `tensor` is stored."""
        return tensor.scheme()


class QuantizedTensor(ABC):
    """A Flax kernel `[in, out]`, stored in few bits a weight: the base class of one pytree for each way of storing."""

    shape: tuple[int, int]

    @abstractmethod
    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The kernel `[in, out]` in `dtype`; pure and jittable. Products are float32, cast last."""

    @abstractmethod
    def scheme(self) -> Quantization:
        """The scheme that `quantize` needs to store another kernel like this one."""

    @property
    def ndim(self) -> int:
        """Axes of the kernel: 2."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays held, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        """Bits held per weight. NF4: 4.5 with blocks of 64, 4.127 with double quantisation. int8: 8 + 32 / in."""
        return 8 * self.size_bytes / self.size


class NumberFormat(ABC):
    """One way to store a kernel. Formats are values without state: one object for each.

    Attributes:
        name: its key in `NUMBER_FORMATS`, as in `--model.quantization`.
        title: the name in a sentence ("NF4").
        citation: "title: authors year, arXiv number" for model cards.
    """

    name: str
    title: str
    citation: str

    @abstractmethod
    def quantize(self, kernel: np.ndarray, *, block_size: int, double_quantization: bool) -> QuantizedTensor:
        """Store `kernel: [in, out]`, computed on the host by numpy; the arrays of the result are numpy arrays.

        Args:
            kernel: float32 or a 16-bit float, not empty.
            block_size: weights per scale, for formats with blocks.
            double_quantization: True: quantise the scales as well, for formats with blocks.

        Raises:
            InputError: if weights are not finite, or the format has no such block size.
        """

    @abstractmethod
    def shape_of(self, shape: tuple[int, int], quantization: Quantization) -> QuantizedTensor:
        """The result of `quantize` for a kernel of `shape`, with a `jax.ShapeDtypeStruct` for each array."""

    def in_words(self, quantization: Quantization) -> str:
        """What `str(quantization)` gives for this format: its name, and whatever else decides how kernels are stored."""
        return self.name
