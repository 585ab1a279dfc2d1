"""The bytes that a compiled program sends between chips, read from its HLO text.

A program is a list of computations, each a list of lines `%name = type opcode(operands), attributes`. Lines in the body of a
loop count once per iteration.
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
"""Operations that move bytes between chips. Each may be split into a `-start`, which is counted, and a `-done`."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(OPCODES)})(-start)?\(")
_CALLED = re.compile(
    r"\b(?:body|calls|to_apply|called_computations|branch_computations)=\{?(%?[\w.-]+(?:, ?%?[\w.-]+)*)\}?"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
# Participants: {{0,1},{2,3}}, or [groups,chips per group]<=[…]. {} or no attribute means all chips.
_GROUPS = re.compile(r"\breplica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
        opcode: one of `OPCODES`.
        array_bytes: a chip's input in arrays.
        scalar_bytes: a chip's input in single numbers.
        num_chips: number of participating chips.
        times: executions per call of the program.
    """

    opcode: str
    array_bytes: int
    scalar_bytes: int
    num_chips: int = 1
    times: int = 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip sends per call, if chips form a ring (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002)."""
        n, size = self.num_chips, (self.array_bytes + self.scalar_bytes) * self.times
        share = (n - 1) / n
        shares = {"all-reduce": 2 * share, "all-gather": n - 1, "collective-permute": 1, "collective-broadcast": 1}
        return shares.get(self.opcode, share) * size


@dataclass(frozen=True)
class Traffic:
    """The collectives of a program.

    Attributes:
        array_bytes: a chip's input in arrays, such as the gradients.
        scalar_bytes: a chip's input in single numbers, such as the loss.
        sent_bytes: bytes that a chip sends for both.
        opcodes: opcode → executions per call.
    """

    array_bytes: int
    scalar_bytes: int
    sent_bytes: float
    opcodes: dict[str, int]


def traffic(hlo: str) -> Traffic:
    """Sum the collectives of one call of the program with the text `hlo`."""
    found = collectives(hlo)
    opcodes: dict[str, int] = {}
    for each in found:
        opcodes[each.opcode] = opcodes.get(each.opcode, 0) + each.times
    return Traffic(
        sum(each.array_bytes * each.times for each in found),
        sum(each.scalar_bytes * each.times for each in found),
        sum(each.sent_bytes for each in found),
        opcodes,
    )


def collectives(hlo: str) -> list[Collective]:
    """Every collective operation in the text of an optimised HLO module, in the order of the text.

    A loop counts as one iteration if XLA does not know the number of iterations.
    """
    lines = dict(_computations(hlo))
    times = _executions(lines)
    partitions = _PARTITIONS.search(hlo)
    everybody = int(partitions[1]) if partitions else 1
    return [
        _collective(match[1], match[2], bool(match[3]), _num_chips(line) or everybody, times.get(name, 1))
        for name, body in lines.items()
        for line in body
        if (match := _COLLECTIVE.match(line))
    ]


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each computation. The entry comes last."""
    name, body = "", list[str]()
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name, body = match[2], []
        elif line.startswith("}") and name:
            yield name, body
            name = ""
        elif name:
            body.append(line)


def _executions(lines: dict[str, list[str]]) -> dict[str, int]:
    """Computation → its executions per call of the program. In HLO's text a caller comes after the computations it calls."""
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


def _num_chips(line: str) -> int | None:
    """Number of chips that take part in the collective of `line`; None if the line does not say."""
    found = _GROUPS.search(line)
    if not found:
        return None
    return found[1].count(",") + 1 if found[1] else int(found[2])


def _collective(kind: str, opcode: str, is_start: bool, num_chips: int, times: int) -> Collective:
    """The operation whose result is of type `kind`."""
    says_both = is_start and opcode in ("all-gather", "collective-permute")  # the type is (input, output, …)
    arrays, scalars = _bytes(_elements(kind)[0] if says_both else kind)
    # The type is that of the output, which may be larger or smaller than the input.
    grown = {"all-gather": num_chips, "reduce-scatter": 1 / num_chips}.get(opcode, 1) if not says_both else 1
    arrays, scalars = arrays / grown, scalars / grown
    return Collective(opcode, math.ceil(arrays), math.ceil(scalars), num_chips, times)


def _bytes(kind: str) -> tuple[float, float]:
    """(bytes of arrays, bytes of scalars) of a type."""
    arrays = scalars = 0.0
    for dtype, dims in _ARRAY.findall(kind):
        size = math.prod(map(int, re.findall(r"\d+", dims)))
        if size > 1:
            arrays += _itemsize(dtype) * size
        else:
            scalars += _itemsize(dtype)
    return arrays, scalars


def _elements(kind: str) -> list[str]:
    """The elements of a tuple's type, which may be tuples themselves."""
    elements, depth, start = [], 0, 1
    for i, letter in enumerate(kind):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (depth == 0 and letter == ")"):
            elements.append(kind[start:i])
            start = i + 1
    return elements


def _itemsize(dtype: str) -> float:
    """Bytes of an element, such as 2 for `bf16` and 1 for `pred`."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 1
