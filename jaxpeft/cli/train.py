"""`jaxpeft train` and `python train.py`: train one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxpeft.cli.process import guarded, own_process
from jaxpeft.config.parsing import parse_run


def main(argv: Sequence[str] | None = None, *, prog: str, default_config: Path | None = None) -> None:
    """Parse a run's flags and train it. `default_config` is read if there is no `--config`."""
    build = parse_run(own_process() if argv is None else list(argv), prog, default_config)

    def run() -> None:
        config = build()
        from jaxpeft.runs import train

        train.run(config)

    guarded(run, prog)
