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
# Who takes part: {{0,1},{2,3}}, or [groups,chips a group]<=[…]; {} and nothing are all chips.
_GROUPS = re.compile(r"\breplica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One operation: its opcode, the bytes that a chip puts in, as arrays and as single numbers, how many chips take part, and how
    often a call runs it.
    """

    opcode: str
    array_bytes: int
    scalar_bytes: int
    num_chips: int = 1
    times: int = 1

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip sends in a call, in a ring (Patarasuk & Yuan 2009, doi 10.1016/j.jpdc.2008.09.002)."""
        n, size = self.num_chips, (self.array_bytes + self.scalar_bytes) * self.times
        share = (n - 1) / n
        shares = {"all-reduce": 2 * share, "all-gather": n - 1, "collective-permute": 1, "collective-broadcast": 1}
        return shares.get(self.opcode, share) * size


@dataclass(frozen=True)
class Traffic:
    """The collectives of a program.

    Attributes:
        array_bytes: a chip's arrays, as they go in: the gradients.
        scalar_bytes: a chip's single numbers, such as the loss.
        sent_bytes: what a chip sends for both.
        opcodes: opcode → how many run in a call.
    """

    array_bytes: int
    scalar_bytes: int
    sent_bytes: float
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
        sum(each.sent_bytes for each in found),
        opcodes,
    )


def collectives(hlo: str) -> list[Collective]:
    """Every collective operation in the text of an optimised HLO module, in the text's order.

    A loop whose number of turns XLA does not know counts as one turn.
    """
    lines = dict(_computations(hlo))
    times = _times(lines)
    partitions = _PARTITIONS.search(hlo)
    everybody = int(partitions[1]) if partitions else 1
    return [
        _collective(match[1], match[2], bool(match[3]), _num_chips(line) or everybody, times.get(name, 1))
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


def _num_chips(line: str) -> int | None:
    """How many chips take part in the collective of `line`; None where it does not say."""
    found = _GROUPS.search(line)
    if not found:
        return None
    return found[1].count(",") + 1 if found[1] else int(found[2])


def _collective(kind: str, opcode: str, is_start: bool, num_chips: int, times: int) -> Collective:
    """The operation whose result is of type `kind`."""
    says_both = is_start and opcode in ("all-gather", "collective-permute")  # (what goes in, what comes out, …)
    arrays, scalars = _bytes(_elements(kind)[0] if says_both else kind)
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
