"""The roofline (Williams et al. 2009, doi 10.1145/1498765.1498785): the least time a step needs on each part of a chip.

    compute = FLOPs / peak        memory = bytes / bandwidth        interconnect = bytes sent / bandwidth

The parts work at the same time, so a step takes at least the longest. FLOPs and bytes are XLA's own count for one chip;
its bytes hold every operand of every fused operation, also what stays in the chip's own memory, so the time of the HBM is too high
rather than too low.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxpeft.preflight.chips import Chip

COMPUTE, MEMORY, INTERCONNECT = "matrix units", "HBM bandwidth", "interconnect"


@dataclass(frozen=True)
class Roofline:
    """Seconds a step by what it needs."""

    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float

    @property
    def parts(self) -> dict[str, float]:
        """Part of the chip → seconds."""
        return {COMPUTE: self.compute_seconds, MEMORY: self.memory_seconds, INTERCONNECT: self.interconnect_seconds}

    @property
    def step_seconds(self) -> float:
        """The estimate: the longest of them."""
        return max(self.parts.values())

    @property
    def limit(self) -> str:
        """The part that it is."""
        return max(self.parts, key=self.parts.__getitem__)


def roofline(chip: Chip, *, flops: float, hbm_bytes: float, sent_bytes: float) -> Roofline:
    """The roofline of a program that does so many `flops`, moves so many bytes of memory and sends so many on each chip."""
    return Roofline(
        flops / chip.flops_per_second,
        hbm_bytes / chip.hbm_bytes_per_second,
        sent_bytes / chip.interconnect_bytes_per_second,
    )
