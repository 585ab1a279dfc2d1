"""`jaxpeft evaluate`: the metrics of a finished run's best adapter."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.config import EvaluationConfig
from jaxpeft.config.parsing import Parser


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments and print the metrics."""
    parser = Parser(prog=prog, description="Measure a run's best adapter on its data.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="The split to measure.")
    parser.add_argument(
        "--pseudo_perplexity", type=bool, default=False, help="Also mask every token one at a time (masked-lm)."
    )
    rows = EvaluationConfig.pseudo_perplexity_rows
    parser.add_argument("--pseudo_perplexity_rows", type=int, default=rows, help="Rows that pseudo-perplexity reads.")
    values = parser.parse_args(list(argv))
    guarded(lambda: run(**values.as_dict()), prog)


def run(run: str, split: str, pseudo_perplexity: bool, pseudo_perplexity_rows: int) -> None:
    """Print the metrics of the best adapter of the run in the directory `run` on its validation or test rows."""
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.load import evaluate

    enable_compilation_cache()
    evaluate(run, split, pseudo_perplexity, pseudo_perplexity_rows)
