"""`jaxpeft preflight`: compile a run's steps for a TPU on a machine without one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.config.parsing import Parser, parse_run_and

_DESCRIPTION = (
    "Compile a run's training and evaluation steps for a TPU without TPU hardware (Linux on x86-64, with libtpu). Report whether they "
    "fit, their cost, their bottleneck and the largest batch. Exit status: 0 if everything fits, 1 if not, 2 for bad input."
)


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse a run's flags and preflight's own flags, and compile. Exits with status 1 if the steps do not fit."""
    values, build = parse_run_and(list(argv), prog, description=_DESCRIPTION, add_flags=_add_flags)

    def run() -> None:
        config = build()
        from jaxpeft.preflight import command

        fits = command.run(
            config, values.topology, largest_batch=values.largest_batch, every_bucket=values.every_bucket
        )
        sys.exit(0 if fits else 1)

    guarded(run, prog)


def _add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--topology", required=True, help="Chip and shape of the slice: v5e:2x4, v5p:2x2x1, v6e:16x16, …"
    )
    parser.add_argument(
        "--largest_batch",
        type=bool,
        default=True,
        help="Also search for the largest training batch; this takes several more compilations.",
    )
    parser.add_argument(
        "--every_bucket",
        type=bool,
        default=False,
        help="Compile every bucket length of a classification, not only the longest.",
    )
