"""The report of preflight, as values and as lines for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jaxpeft.preflight.chips import GIBIBYTE, Topology, parse_topology
from jaxpeft.preflight.collectives import Traffic
from jaxpeft.preflight.compiled import Compiled, Costs, Memory, Shortage
from jaxpeft.preflight.largest_batch import Attempt, Largest
from jaxpeft.preflight.roofline import Roofline


@dataclass(frozen=True)
class Program:
    """One step, compiled for a batch of `batch_size` texts in `num_rows` rows of `length` tokens, over all chips together.

    Training takes the rows in `passes`.
    """

    kind: Literal["training", "evaluation"]
    batch_size: int
    num_rows: int
    length: int
    compiled: Compiled
    passes: int = 1


@dataclass(frozen=True)
class Report:
    """A run's programs for a topology.

    Attributes:
        topology: name of the slice, such as `v5e:2x4`.
        jax_version: version of jax, which lowered the programs.
        libtpu_version: version of libtpu, which compiled them.
        gradient_bytes: bytes of the gradients of all trained parameters, in fp32.
        programs: the compiled programs, the longest rows first.
        lengths_left_out: lengths of shorter buckets that were not compiled.
        counts_data: True if the arguments include the training rows, which every chip holds.
        largest_batch: the largest training batch of the longest rows that fits in one pass; None if it was not requested.
    """

    topology: str
    jax_version: str
    libtpu_version: str
    gradient_bytes: int
    programs: tuple[Program, ...]
    lengths_left_out: tuple[int, ...]
    counts_data: bool
    largest_batch: Largest | None

    @property
    def fits(self) -> bool:
        """True if every program fits."""
        return all(isinstance(program.compiled.outcome, Costs) for program in self.programs)


def read_report(values: dict[str, Any]) -> Report:
    """Rebuild a `Report` from the nested dicts of `dataclasses.asdict`."""
    largest = values["largest_batch"]
    if largest:
        largest = Largest(largest["rows"], largest["too_many"], tuple(Attempt(**each) for each in largest["attempts"]))
    programs = tuple(Program(**{**each, "compiled": _compiled(each["compiled"])}) for each in values["programs"])
    left_out = tuple(values["lengths_left_out"])
    return Report(**{**values, "programs": programs, "lengths_left_out": left_out, "largest_batch": largest})


def _compiled(values: dict[str, Any]) -> Compiled:
    outcome = values["outcome"]
    if "available_bytes" in outcome:
        return Compiled(values["seconds"], Shortage(**outcome))
    parts = {"memory": Memory, "traffic": Traffic, "roofline": Roofline}
    return Compiled(
        values["seconds"],
        Costs(**{key: parts.get(key, float)(**value) if key in parts else value for key, value in outcome.items()}),
    )


def lines(report: Report) -> Iterator[str]:
    """The lines of the report for a reader."""
    topology = parse_topology(report.topology)
    made = f"libtpu {report.libtpu_version} for jax {report.jax_version}"
    yield f"{report.topology}: {topology.num_chips} × TPU {topology.chip.name}, compiled by {made}"
    for program in report.programs:
        yield ""
        yield from _program_lines(program, topology, report.gradient_bytes)
    if report.lengths_left_out:
        left_out = ", ".join(map(str, report.lengths_left_out))
        yield f"\nnot compiled: buckets of {left_out} tokens, which need less of everything (--every_bucket true compiles them)"
    if not report.counts_data:
        yield "\nnot counted: the training rows, 4 bytes a token, which every chip also holds if they take at most 0.5 GiB"
    if report.largest_batch:
        yield "\n" + _largest_line(report.largest_batch, topology)
    yield (
        "\nit fits"
        if report.fits
        else "\nit does not fit: lower a batch size, or set --model.gradient_checkpointing true or --training.micro_batch_size auto"
    )


def _program_lines(program: Program, topology: Topology, gradient_bytes: int) -> Iterator[str]:
    rows = program.num_rows // topology.num_chips
    packed = f"{program.batch_size} texts in " if program.num_rows != program.batch_size else ""
    outcome = program.compiled.outcome
    verdict = "fits" if isinstance(outcome, Costs) else "does not fit"
    passes = f" in {program.passes} passes" if program.passes > 1 else ""
    yield (
        f"{program.kind} step, {packed}{program.num_rows} rows of {program.length} tokens, {rows} a chip{passes}: {verdict} "
        f"(compiled in {program.compiled.seconds:.0f} s)"
    )
    if isinstance(outcome, Shortage):
        yield f"  memory a chip  at least {_gib(outcome.needed_bytes)} of {_gib(outcome.available_bytes)} GiB"
        return
    memory, times = outcome.memory, outcome.roofline
    parts = (
        ("arguments", memory.argument_bytes), ("outputs", memory.output_bytes),
        ("temporaries", memory.temporary_bytes), ("code", memory.code_bytes),
    )  # fmt: skip
    listed = ", ".join(f"{name} {_gib(size)}" for name, size in parts)
    yield f"  memory a chip  {_gib(memory.total_bytes)} of {_gib(topology.chip.program_hbm_bytes)} GiB: {listed}"
    yield f"  FLOPs          {outcome.flops / 1e9:,.1f} G a chip, {outcome.flops * topology.num_chips / 1e12:,.2f} T over all chips"
    yield f"  collectives    {_collectives(outcome.traffic, gradient_bytes if program.kind == 'training' else 0)}"
    listed = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in times.parts.items())
    yield f"  roofline       {_ms(times.step_seconds)}, limited by {times.limit}: {listed}"
    tokens = program.num_rows * program.length / times.step_seconds
    yield f"                 at most {tokens:,.0f} tokens/s, with padding"


def _collectives(traffic: Traffic, gradient_bytes: int) -> str:
    if not traffic.opcodes:
        return "none"
    operations = ", ".join(f"{count} {opcode}" for opcode, count in sorted(traffic.opcodes.items()))
    trained = f" (gradients in fp32: {gradient_bytes:,})" if gradient_bytes else ""
    return f"{traffic.array_bytes:,} bytes of arrays a chip{trained}; {traffic.scalar_bytes} of scalars ({operations})"


def _largest_line(largest: Largest, topology: Topology) -> str:
    tried = f"{len(largest.attempts)} compilations"
    if not largest.rows:
        return f"largest training batch in one pass: not even {largest.too_many} texts a chip fit ({tried})"
    limit = f"; {largest.too_many * topology.num_chips:,} do not" if largest.too_many else " at least"
    return f"largest training batch in one pass: {largest.rows * topology.num_chips:,} texts ({largest.rows:,} a chip) fit{limit} ({tried})"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIBIBYTE:,.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"
