"""FP4: a float of one sign, two exponent and one mantissa bit, scaled to [-1, 1], as bitsandbytes has it."""

from __future__ import annotations

import numpy as np

from jaxpeft.quantization.codebook import Codebook
from jaxpeft.quantization.four_bit import FourBit

_TWELFTHS = [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]

FP4 = FourBit(name="fp4", title="FP4", codebook=Codebook(np.asarray(_TWELFTHS, np.float32) / np.float32(12)))
"""Values by bit pattern, so not ascending; codes 0 and 8 are both zero."""
