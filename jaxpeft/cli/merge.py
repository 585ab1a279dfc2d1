"""`jaxpeft merge`: a run's base with its adapter merged in, as a transformers model."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.config.parsing import Parser


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments and write the model."""
    parser = Parser(prog=prog, description="Merge a run's adapter into its base, as a model that transformers loads.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("output", help="A new directory for the model.")
    parser.add_argument(
        "--requantize",
        type=bool,
        default=False,
        help="Quantise the merged weights again, as the run's base is; false: write them in float32.",
    )
    values = parser.parse_args(list(argv))
    guarded(lambda: run(**values.as_dict()), prog)


def run(run: str, output: str, requantize: bool) -> None:
    """Merge the run in the directory `run` into the new directory `output`."""
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.load import merge

    enable_compilation_cache()
    merge(run, output, requantize)
