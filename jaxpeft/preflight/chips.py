"""The TPUs that preflight knows: the capabilities of a chip and the available slices.

Figures are from Google's pages https://cloud.google.com/tpu/docs/v5e, …/v5p and …/v6e. For the interconnect they count the
bytes that a chip sends over all links together: half of the bidirectional bandwidth on the pages. `program_hbm_bytes` is the
part of the chip's HBM that the compiler (libtpu 0.0.42) leaves to programs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxpeft.errors import InputError, did_you_mean

GIBIBYTE = 2**30


@dataclass(frozen=True)
class Chip:
    """One TPU chip. Matrix products in fp32 run at the bf16 rate, because XLA's default precision rounds factors to bf16.

    Attributes:
        name: Google's name, such as `v5e`.
        program_hbm_bytes: memory for arguments, temporaries and code.
        flops_per_second: peak of the matrix units in bf16.
        hbm_bytes_per_second: peak bandwidth of the memory.
        interconnect_bytes_per_second: peak bandwidth for sending to other chips.
        shapes: the available slices, up to 256 chips.
    """

    name: str
    program_hbm_bytes: int
    flops_per_second: float
    hbm_bytes_per_second: float
    interconnect_bytes_per_second: float
    shapes: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")

CHIPS = {
    "v5e": Chip("v5e", int(15.75 * GIBIBYTE), 197e12, 819e9, 200e9, _FLAT),
    "v5p": Chip("v5p", int(95.74 * GIBIBYTE), 459e12, 2765e9, 600e9, _DEEP),
    "v6e": Chip("v6e", int(31.25 * GIBIBYTE), 918e12, 1640e9, 400e9, _FLAT),
}
"""The known chips by name."""


@dataclass(frozen=True)
class Topology:
    """A slice: chips of one kind in a shape, such as `v5e:2x4`."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        """The name for libtpu and `--topology`, such as `v5e:2x4`."""
        return f"{self.chip.name}:{self.shape}"

    @property
    def num_chips(self) -> int:
        """Number of chips in the slice."""
        return math.prod(map(int, self.shape.split("x")))


def parse_topology(name: str) -> Topology:
    """Parse a slice's name, such as `v5e:2x4`.

    Raises:
        InputError: the chip is unknown, or not available in that shape.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise InputError(
            f"topology '{name}': no such chip{did_you_mean(kind, CHIPS)}; give one of {', '.join(CHIPS)} and a shape, such as v5e:2x4"
        )
    chip = CHIPS[kind]
    if shape not in chip.shapes:
        raise InputError(f"topology '{name}': unknown shape; {kind} comes in {', '.join(chip.shapes)}")
    return Topology(chip, shape)
