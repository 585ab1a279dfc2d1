"""What the TPU's compiler says of a program: its sizes, its FLOPs and bytes, or that it does not fit."""

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
# Two of the compiler's sentences. The first counts temporaries only; the second all that a program needs.
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")


@dataclass(frozen=True)
class Memory:
    """Bytes on a chip: what a program is given and keeps, what it returns beside that, temporaries, and its own code."""

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True)
class Costs:
    """A program that fits: figures for one chip and one call."""

    memory: Memory
    flops: float
    hbm_bytes: float
    traffic: Traffic
    roofline: Roofline


@dataclass(frozen=True)
class Shortage:
    """A program that does not fit: the bytes a chip that it needs, at least, and those it has."""

    needed_bytes: int
    available_bytes: int


@dataclass(frozen=True)
class Compiled:
    """How a compilation ended, and how long it took."""

    seconds: float
    outcome: Costs | Shortage

    @property
    def needed_bytes(self) -> int:
        """Bytes a chip."""
        return self.outcome.memory.total_bytes if isinstance(self.outcome, Costs) else self.outcome.needed_bytes


def compile_for(topology: Topology, lowered: jax.stages.Lowered, *, argument_bytes: int) -> Compiled:
    """Compile `lowered`, whose arguments take `argument_bytes` a chip, for the chips of `topology` that it was lowered for."""
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
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.generated_code_size_in_bytes,
    )
    sent = traffic(compiled.as_text() or "")
    flops, hbm_bytes = counted["flops"], counted["bytes accessed"]
    times = roofline(topology.chip, flops=flops, hbm_bytes=hbm_bytes, sent_bytes=sent.sent_bytes)
    return Compiled(seconds, Costs(memory, flops, hbm_bytes, sent, times))


def read_shortage(message: str, *, argument_bytes: int) -> Shortage | None:
    """The sizes in the compiler's RESOURCE_EXHAUSTED, or None where `message` is of another error."""
    if not message.startswith("RESOURCE_EXHAUSTED"):
        return None
    if found := _USED.search(message):
        return Shortage(_bytes(found[1], found[2]), _bytes(found[3], found[4]))
    if found := _TEMPORARIES.search(message):
        return Shortage(_bytes(found[1], found[2]) + argument_bytes, _bytes(found[3], found[4]))
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])
