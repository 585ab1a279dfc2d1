"""The roofline (Williams et al. 2009, doi 10.1145/1498765.1498785): the least time a step needs on each part of a chip.

    compute = FLOPs / peak        memory = bytes / bandwidth        interconnect = bytes sent / bandwidth

The parts work at the same time, so a step takes at least the longest of these times. FLOPs and bytes are XLA's own count for
one chip. XLA counts the bytes of every operand of every fused operation, including those that stay in the chip's own memory,
so the time of the HBM is an upper estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxpeft.preflight.chips import Chip

COMPUTE, MEMORY, INTERCONNECT = "matrix units", "HBM bandwidth", "interconnect"


@dataclass(frozen=True)
class Roofline:
    """Seconds per step on each part of a chip."""

    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float

    @property
    def parts(self) -> dict[str, float]:
        """Part of the chip → seconds."""
        return {COMPUTE: self.compute_seconds, MEMORY: self.memory_seconds, INTERCONNECT: self.interconnect_seconds}

    @property
    def step_seconds(self) -> float:
        """The estimate of a step's seconds: the longest of the parts."""
        return max(self.parts.values())

    @property
    def limit(self) -> str:
        """The name of the part that takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def roofline(chip: Chip, *, flops: float, hbm_bytes: float, sent_bytes: float) -> Roofline:
    """The roofline of a program on `chip`.

    Args:
        chip: the chip.
        flops: floating-point operations per chip.
        hbm_bytes: bytes per chip to and from memory.
        sent_bytes: bytes that each chip sends to others.
    """
    return Roofline(
        flops / chip.flops_per_second,
        hbm_bytes / chip.hbm_bytes_per_second,
        sent_bytes / chip.interconnect_bytes_per_second,
    )
