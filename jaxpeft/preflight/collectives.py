"""What a compiled program sends between chips, read from its HLO text.

A program is a list of computations, each a list of lines `%name = type opcode(operands), attributes`. Lines in the body of a
loop count as often as the loop turns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

OPCODES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
"""The operations that move bytes between chips; each may be split into a `-start`, which counts, and a `-done`."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(OPCODES)})(-start)?\(")
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|called_computations|branch_computations)=\{?(%?[\w.-]+(?:, ?%?[\w.-]+)*)\}?"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")


@dataclass(frozen=True)
class Collective:
    """One operation: its opcode, the bytes a chip contributes, as arrays and as single numbers, and how often a call runs it."""

    opcode: str
    array_bytes: int
    scalar_bytes: int
    times: int = 1


@dataclass(frozen=True)
class Traffic:
    """The collectives of a program.

    Attributes:
        array_bytes: a chip's arrays, as they go in: the gradients.
        scalar_bytes: a chip's single numbers, such as the loss.
        opcodes: opcode → how many run in a call.
    """

    array_bytes: int
    scalar_bytes: int
    opcodes: dict[str, int]


def traffic(hlo: str) -> Traffic:
    """The collectives that one call of the program `hlo` runs."""
    found = collectives(hlo)
    opcodes: dict[str, int] = {}
    for each in found:
        opcodes[each.opcode] = opcodes.get(each.opcode, 0) + each.times
    return Traffic(
        sum(each.array_bytes * each.times for each in found),
        sum(each.scalar_bytes * each.times for each in found),
        opcodes,
    )


def collectives(hlo: str) -> list[Collective]:
    """Every collective operation in the text of an optimised HLO module, in the text's order.

    A loop whose number of turns XLA does not know counts as one turn.
    """
    lines = dict(_computations(hlo))
    times = _times(lines)
    return [
        Collective(match[2], *_bytes(match[1], match[2], bool(match[3])), times=times.get(name, 1))
        for name, body in lines.items()
        for line in body
        if (match := _COLLECTIVE.match(line))
    ]


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each computation, the entry's last."""
    name, body = "", list[str]()
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name, body = match[2], []
        elif line.startswith("}") and name:
            yield name, body
            name = ""
        elif name:
            body.append(line)


def _times(lines: dict[str, list[str]]) -> dict[str, int]:
    """Computation → how often a call of the program runs it. A caller stands behind what it calls, in HLO's text."""
    times = dict.fromkeys(lines, 0)
    if times:
        times[list(lines)[-1]] = 1
    for name in reversed(lines):
        for line in lines[name]:
            trips = _TRIPS.search(line) if " while(" in line else None
            for called in _CALLED.finditer(line):
                for callee in called[1].split(","):
                    callee = callee.strip(" %")
                    times[callee] = times.get(callee, 0) + times[name] * (int(trips[1]) if trips else 1)
    return times


def _bytes(kind: str, opcode: str, is_start: bool) -> tuple[int, int]:
    """(bytes of arrays, bytes of scalars) in the type of a collective's result."""
    if is_start and opcode in ("all-gather", "collective-permute"):
        # The type of these is (what goes in, what comes out, …).
        kind = _elements(kind)[1]
    arrays = scalars = 0.0
    for dtype, dims in _ARRAY.findall(kind):
        size = math.prod(map(int, re.findall(r"\d+", dims)))
        if size > 1:
            arrays += _itemsize(dtype) * size
        else:
            scalars += _itemsize(dtype)
    return math.ceil(arrays), math.ceil(scalars)


def _elements(kind: str) -> list[str]:
    """The elements of a tuple's type, themselves perhaps tuples."""
    elements, depth, start = [], 0, 1
    for i, letter in enumerate(kind):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (depth == 0 and letter == ")"):
            elements.append(kind[start:i])
            start = i + 1
    return elements


def _itemsize(dtype: str) -> float:
    """Bytes of an element: `bf16` is 2, `pred` 1."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1
