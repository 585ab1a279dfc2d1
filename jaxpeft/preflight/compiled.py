"""Compile a program with the TPU compiler, and read its sizes, FLOPs and bytes, or the shortage if it does not fit."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from jaxpeft.preflight.chips import Topology
from jaxpeft.preflight.collectives import Traffic, traffic
from jaxpeft.preflight.roofline import Roofline, roofline

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"
# Two messages of the compiler. The first counts only temporaries, and the second all memory of the program.
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")


@dataclass(frozen=True)
class Memory:
    """Bytes on a chip: arguments, outputs that do not reuse arguments, temporaries, and the program's code."""

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of the four, in bytes."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class Costs:
    """The costs of a program that fits, for one chip and one call."""

    memory: Memory
    flops: float
    hbm_bytes: float
    traffic: Traffic
    roofline: Roofline


@dataclass(frozen=True)
class Shortage:
    """A program that does not fit: the bytes that it needs per chip (at least), and those that are available."""

    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Compiled:
    """The outcome of a compilation, and its duration in seconds."""

    seconds: float
    outcome: Costs | Shortage

    @property
    def needed_bytes(self) -> int:
        """Bytes that the program needs per chip, whether it fits or not."""
        return self.outcome.memory.total_bytes if isinstance(self.outcome, Costs) else self.outcome.needed_bytes


def compile_for(topology: Topology, lowered: jax.stages.Lowered, *, argument_bytes: int, passes: int = 1) -> Compiled:
    """Compile `lowered` for the chips of `topology`, for which it was lowered. Its arguments take `argument_bytes` per chip.

    Of a micro-step in several `passes` the compiler counts only one. Its costs are multiplied, which counts the optimizer too often.
    """
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        shortage = read_shortage(str(error), argument_bytes=argument_bytes)
        if shortage is None:
            raise
        return Compiled(time.monotonic() - started, shortage)
    seconds = time.monotonic() - started
    sizes: Any = compiled.memory_analysis()
    counted: Any = compiled.cost_analysis()
    memory = Memory(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,  # donated arguments are reused for outputs
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
    )
    sent = traffic(compiled.as_text() or "")
    flops, hbm_bytes = passes * counted["flops"], passes * counted["bytes accessed"]
    times = roofline(topology.chip, flops=flops, hbm_bytes=hbm_bytes, sent_bytes=passes * sent.sent_bytes)
    return Compiled(seconds, Costs(memory, flops, hbm_bytes, sent, times))


def read_shortage(message: str, *, argument_bytes: int) -> Shortage | None:
    """The sizes in the compiler's RESOURCE_EXHAUSTED `message`, or None if it is another error."""
    if not message.startswith("RESOURCE_EXHAUSTED"):
        return None
    if found := _USED.search(message):
        return Shortage(_bytes(found[1], found[2]), _bytes(found[3], found[4]))
    if found := _TEMPORARIES.search(message):
        return Shortage(_bytes(found[1], found[2]) + argument_bytes, _bytes(found[3], found[4]))
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
