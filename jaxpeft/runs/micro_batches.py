"""Decide how many rows a pass computes: as given, as a resumed run had it, or by the memory of the compiled program."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxpeft.config import TrainingConfig
from jaxpeft.models.build import Model
from jaxpeft.report.console import log
from jaxpeft.training.checkpoint import Progress
from jaxpeft.training.micro_batches import MicroBatches, fewest_passes
from jaxpeft.training.sharding import DataParallel
from jaxpeft.trees import size_bytes, under

CPU_TEMPORARY_BYTES = 640 * 2**20
"""Temporary memory up to which a pass takes more rows on a CPU. The figures are in `benchmarks/README.md`."""

_FREE_SHARE = 0.9
"""Share of an accelerator's free memory that a step may take. The rest is for the arrays of evaluation, and for gaps."""

_BYTES_PER_CHANNEL = 14
"""Temporary bytes per token and output channel of a linear layer, measured in BERT-base. A wrong guess costs a compilation."""

Compile = Callable[[MicroBatches], jax.stages.Compiled]
"""Compiles the run's program with these micro-batches."""


def decide(
    training: TrainingConfig,
    parallel: DataParallel,
    progress: Progress,
    data: Any,
    compiled: Compile,
    *,
    model: Model,
    trained: Any,
    virtual_tokens: int = 0,
) -> tuple[MicroBatches, Progress]:
    """The micro-batches of a run, and its progress, in which they are recorded.

    Args:
        training: the training flags.
        parallel: the devices.
        progress: the progress of the run. If it has steps, `auto` decides as it did before.
        data: the training data, whose longest rows decide.
        compiled: compiles the program that needs the most memory.
        model: the model, whose widths say which program a CPU compiles first.
        trained: the trained parameters of a run.
        virtual_tokens: tokens that prompt tuning puts in front of every row.
    """
    rows, length = max(data.batch_shapes, key=math.prod)
    whole = MicroBatches(devices=parallel.mesh.size, virtual_tokens=virtual_tokens)
    in_row, own = length + virtual_tokens, rows // whole.devices

    def divided(passes: int) -> MicroBatches:
        return replace(whole, tokens=-(-own // passes) * whole.devices * in_row) if passes > 1 else whole

    def agreed(passes: int) -> MicroBatches:
        return divided(int(parallel.largest(passes)))  # all processes must run the same program

    if isinstance(training.micro_batch_size, int):
        chosen = replace(whole, rows=training.micro_batch_size * getattr(data, "texts_per_row", 1))
    elif progress.step:
        chosen = replace(whole, tokens=progress.micro_batch_tokens)
    elif parallel.device.platform == "cpu":
        expected = own * in_row * _bytes_per_token(model)
        passes = _passes_on_cpu(own, expected, lambda n: compiled(divided(n)), 2 * size_bytes(trained))
        chosen = agreed(passes)
    else:
        chosen = agreed(_passes_that_fit(own, parallel, lambda n: compiled(divided(n))))
    found = chosen.rows_of(rows, length)
    tokens = None if found.in_pass == own else found.in_pass * whole.devices * in_row
    if tokens:
        in_pass, unit = found.in_pass * whole.devices, "texts" if hasattr(data, "texts_per_row") else "rows"
        log(
            f"micro-batches: {-(-own // found.in_pass)} passes of {in_pass} {unit} for a batch of {rows} {unit} of {length} tokens"
        )
    return chosen, replace(progress, micro_batch_tokens=tokens)


def _passes_on_cpu(
    rows: int, expected_bytes: int, compiled: Callable[[int], jax.stages.Compiled], gradient_bytes: int
) -> int:
    """The fewest passes whose temporary memory a CPU takes without getting slower.

    `gradient_bytes`, the gradients of a pass and their sum, are not counted: they are as large in every pass.
    """

    def needed_bytes(passes: int) -> int:
        sizes: Any = compiled(passes).memory_analysis()
        return sizes.temp_size_in_bytes - gradient_bytes

    first = 1
    while expected_bytes > CPU_TEMPORARY_BYTES * first and first < rows:
        first *= 2
    return fewest_passes(needed_bytes, rows, first=first, limit_bytes=CPU_TEMPORARY_BYTES)


def _passes_that_fit(rows: int, parallel: DataParallel, compiled: Callable[[int], jax.stages.Compiled]) -> int:
    """The fewest passes that fit into the free memory of an accelerator; one if the device does not say how much it has."""
    memory = parallel.mesh.local_devices[0].memory_stats() or {}
    if "bytes_limit" not in memory:
        return 1
    free = memory["bytes_limit"] - memory.get("bytes_in_use", 0)

    def needed_bytes(passes: int) -> int | None:
        try:
            sizes: Any = compiled(passes).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None
        # The arguments are in use already. Outputs that do not take their place are new.
        return sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes

    return fewest_passes(needed_bytes, rows, first=1, limit_bytes=int(_FREE_SHARE * free))


def _bytes_per_token(model: Model) -> int:
    """About how many temporary bytes a step of `model` needs for a token of a batch."""
    encoder = [model.base_prefix]
    return _BYTES_PER_CHANNEL * sum(
        site.d_out for site in model.sites().values() if site.kind == "linear" and under(site.path, encoder)
    )
