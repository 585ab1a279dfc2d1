"""`jaxpeft evaluate`: the metrics of a finished run's best adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxpeft.cli.process import guarded
from jaxpeft.config import EvaluationConfig
from jaxpeft.config.parsing import Parser
from jaxpeft.errors import InputError


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments and print the metrics."""
    parser = Parser(prog=prog, description="Measure a run's best adapter on its data.")
    parser.add_argument("run", help="A run's directory, such as runs/quickstart.")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="The split to measure.")
    parser.add_argument(
        "--pseudo_perplexity", type=bool, default=False, help="Also mask every token one at a time (masked-lm)."
    )
    rows = EvaluationConfig.pseudo_perplexity_rows
    parser.add_argument("--pseudo_perplexity_rows", type=int, default=rows, help="Rows used for pseudo-perplexity.")
    values = parser.parse_args(list(argv))
    guarded(lambda: evaluate(**values.as_dict()), prog)


def evaluate(run: str, split: str, pseudo_perplexity: bool, pseudo_perplexity_rows: int) -> None:
    """Print the metrics of the best adapter of the run in the directory `run` on its validation or test rows."""
    from jaxpeft.report.console import log, show_table
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.data import load_data
    from jaxpeft.runs.evaluator import Evaluator
    from jaxpeft.runs.load import load_run
    from jaxpeft.tasks.by_class import HEADS
    from jaxpeft.tasks.metrics import get_metric
    from jaxpeft.training.sharding import data_parallel

    enable_compilation_cache()
    finished = load_run(run)
    config = finished.config
    if pseudo_perplexity and not finished.objective.task.fills_masks:
        raise InputError(f"pseudo-perplexity is a figure of masked-lm, but '{run}' is a {config.task} run")
    options = replace(
        config.evaluation, pseudo_perplexity=pseudo_perplexity, pseudo_perplexity_rows=pseudo_perplexity_rows
    )
    task, splits = load_data(config.data, config.task, config.model, config.task_options)
    if split == "test" and splits.test is None:
        log("there is no labelled test split: measuring on validation")
    if split == "validation":
        splits = replace(splits, test=splits.validation)
    evaluator = Evaluator.build(
        options,
        splits,
        finished.pipeline,
        replace(finished.objective, task=task.with_calibration(finished.results.calibration)),
        data_parallel(),
        seed=config.seed,
    )
    metrics, classes = evaluator.test(finished.frozen, finished.adapters, {})
    for name, value in metrics.items():
        log(f"{task.metric_title(name, splits.label_names):24} {get_metric(name).in_words(value)}")
    if classes:
        show_table("", HEADS, [each.cells() for each in classes.classes])
