"""The process that compiles, and the only one that loads libtpu: `python -m jaxpeft.preflight.child REQUEST`.

`command.py` starts it. It reads the request (a JSON file), prints a line for each program, and writes its answer beside the
request: a `Report` or an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxpeft.config.files import read_config
from jaxpeft.errors import InputError
from jaxpeft.preflight.abstract_run import AbstractRun, abstract_run, lower_evaluation, lower_training
from jaxpeft.preflight.chips import Topology, parse_topology
from jaxpeft.preflight.compiled import Compiled, Costs, compile_for
from jaxpeft.preflight.largest_batch import Attempt, Largest, largest_batch
from jaxpeft.preflight.report import Program, Report
from jaxpeft.report.console import log
from jaxpeft.training.micro_batches import MicroBatches
from jaxpeft.training.sharding import data_parallel
from jaxpeft.trees import size_bytes


def main() -> None:
    """Answer the request in the file that is the first argument."""
    file = Path(sys.argv[1])
    request = json.loads(file.read_text())
    config = read_config(Path(request["config"]))
    topology = parse_topology(request["topology"])
    try:
        parallel = data_parallel(_devices(topology))
        parallel.check(config.training.batch_size, "training.batch_size")
        if config.training.micro_batch_size != "auto":
            parallel.check(config.training.micro_batch_size, "training.micro_batch_size")
        parallel.check(config.evaluation.batch_size, "evaluation.batch_size")
        report = preflight(
            abstract_run(config, parallel),
            topology,
            find_largest=request["largest_batch"],
            every_bucket=request["every_bucket"],
            kinds=request["kinds"],
        )
        answer: dict[str, Any] = {"report": asdict(report)}
    except InputError as error:
        answer = {"error": str(error)}
    file.with_name("answer.json").write_text(json.dumps(answer))


def preflight(
    run: AbstractRun, topology: Topology, *, find_largest: bool, every_bucket: bool, kinds: Sequence[str]
) -> Report:
    """Compile the run's steps of `kinds` ("training" first) for `topology`; see `report.Report`."""
    lengths = run.lengths if every_bucket else run.lengths[-1:]
    # Packed rows have one length, so training has one program.
    wanted = [
        (kind, length)
        for length in reversed(lengths)
        for kind in kinds
        if kind == "evaluation" or length == lengths[-1] or not run.is_packed
    ]
    programs = [_program(kind, run, topology, length) for kind, length in wanted]
    largest = _largest(run, topology, programs[0]) if find_largest else None
    return Report(
        topology=topology.name,
        jax_version=jax.__version__,
        libtpu_version=_libtpu_version(),
        gradient_bytes=run.gradient_bytes,
        programs=tuple(programs),
        lengths_left_out=run.lengths[: len(run.lengths) - len(lengths)],
        counts_data=run.task.reads_labels,
        largest_batch=largest,
    )


def _devices(topology: Topology) -> Any:
    # libtpu's default is a host of four or eight chips, so a single chip must be requested.
    hosts = {"chips_per_host_bounds": (1, 1, 1)} if topology.num_chips == 1 else {}
    devices = topologies.get_topology_desc(topology.name, platform="tpu", **hosts).devices
    assert len(devices) == topology.num_chips, (topology, len(devices))
    return devices


def _program(kind: Any, run: AbstractRun, topology: Topology, length: int) -> Program:
    size = run.batch_sizes[kind]
    if kind == "evaluation":
        log(f"compiling the evaluation step, {size} rows of {length} tokens …")
        lowered = lower_evaluation(run, size, length)
        return Program(kind, size, size, length, compile_for(topology, lowered, argument_bytes=_fixed_bytes(run)))
    rows, length_of_rows = run.training_shape(size, length)
    passes, compiled = _training(run, topology, size, length)
    return Program(kind, size, rows, length_of_rows, compiled, passes)


def _training(run: AbstractRun, topology: Topology, batch_size: int, length: int) -> tuple[int, Compiled]:
    """The passes of a batch, and its program. `auto` takes the fewest passes that fit, as in training (`runs.micro_batches`)."""
    rows, length_of_rows = run.training_shape(batch_size, length)
    chips = topology.num_chips
    own = rows // chips
    given = run.micro_batch_size
    passes = 1 if given == "auto" else -(-own // max(given // chips, 1))
    while True:
        in_pass = -(-own // passes)
        passes = -(-own // in_pass)  # 6 rows in passes of 2 are 3 passes, not 4
        log(f"compiling the training step, {in_pass * chips} rows of {length_of_rows} tokens …")
        lowered = lower_training(run, batch_size, length, MicroBatches(rows=in_pass * chips, devices=chips))
        compiled = compile_for(topology, lowered, argument_bytes=_fixed_bytes(run), passes=passes)
        if isinstance(compiled.outcome, Costs) or given != "auto" or in_pass == 1:
            return passes, compiled
        passes = 1 << passes.bit_length()


def _fixed_bytes(run: AbstractRun) -> int:
    return size_bytes(run.frozen) + size_bytes(run.state.adapters) + size_bytes(run.state.opt_state)


def _largest(run: AbstractRun, topology: Topology, training: Program) -> Largest:
    """The largest number of rows of the longest length that fits on a chip in one pass of training."""

    def attempt(rows: int) -> Attempt:
        batch_size = rows * topology.num_chips
        log(f"compiling the training step, {batch_size} texts …")
        lowered = lower_training(run, batch_size, run.lengths[-1])
        compiled = compile_for(topology, lowered, argument_bytes=_fixed_bytes(run))
        return Attempt(rows, isinstance(compiled.outcome, Costs), compiled.needed_bytes)

    outcome = training.compiled.outcome
    own = training.batch_size // topology.num_chips
    first = (
        attempt(own)
        if training.passes > 1
        else Attempt(own, isinstance(outcome, Costs), training.compiled.needed_bytes)
    )
    limit, texts = topology.chip.program_hbm_bytes, run.num_texts
    most = None if texts is None else max(texts // topology.num_chips, first.rows)
    return largest_batch(attempt, first, fixed_bytes=_fixed_bytes(run), limit_bytes=limit, most=most)


def _libtpu_version() -> str:
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:  # libtpu is a file named by TPU_LIBRARY_PATH, not a package
        return "of unknown version"


if __name__ == "__main__":
    main()
