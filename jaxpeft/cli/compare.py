"""`jaxpeft compare`: many runs from one file, and one report."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.comparison.grid import CompareConfig
from jaxpeft.config.parsing import parse_file_into

_DESCRIPTION = (
    "Compare methods, each at its own best learning rate, over several seeds, with full fine-tuning and the head alone as references. "
    "Writes one report as Markdown, HTML and CSV. Run the same command again to continue after an interruption."
)


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse a comparison's file and flags, train its remaining runs, and write its report."""
    build = parse_file_into(CompareConfig, list(argv), prog, description=_DESCRIPTION)

    def run() -> None:
        config = build()
        from jaxpeft.comparison import command

        command.run(config)

    guarded(run, prog)
