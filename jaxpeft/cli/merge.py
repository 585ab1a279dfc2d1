"""`jaxpeft merge`: a run's base with its adapter merged in, as a transformers model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from jaxpeft.cli.process import guarded
from jaxpeft.config.parsing import Parser
from jaxpeft.errors import InputError


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
    parser.add_argument(
        "--keep_sparsity",
        type=bool,
        default=False,
        help="Keep the zeros of a pruned base: drop the update there, and print what that costs.",
    )
    values = parser.parse_args(list(argv))
    guarded(lambda: merge(**values.as_dict()), prog)


def merge(run: str, output: str, requantize: bool, keep_sparsity: bool) -> None:
    """Merge the run in the directory `run`, and write the model to the new directory `output`: in fp32, or quantised as the base.

    With `keep_sparsity`, the zeros of the base stay, and the cost is printed.

    Raises:
        InputError: `output` is not new, there is no finished run, or its adapter cannot be merged.
    """
    from jaxpeft.interop.transformers_files import new_directory, save_beside, save_model
    from jaxpeft.merging import merge as merge_trees
    from jaxpeft.quantization import is_quantized
    from jaxpeft.report.console import log
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.kept_zeros import cost_of_keeping_zeros
    from jaxpeft.runs.load import load_run
    from jaxpeft.trees import leaf_paths

    enable_compilation_cache()
    target = new_directory(output)
    finished = load_run(run)
    model, method = finished.objective.model, finished.objective.method
    if requantize and not any(map(is_quantized, leaf_paths(finished.frozen).values())):
        raise InputError(f"--requantize is true, but the base of '{run}' is not quantised; leave it out")
    if tied := model.tied_embeddings(finished.adapters["sites"]):
        raise InputError(
            f"the adapter of '{tied}' cannot be merged: the model's decoder is tied to it and would change too; serve it as an adapter"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = merge_trees(
            finished.frozen, finished.adapters, method, requantize=requantize, keep_sparsity=keep_sparsity
        )
    for warning in caught:
        log(f"warning: {warning.message}")
    if keep_sparsity:
        for line in cost_of_keeping_zeros(finished, params):
            log(line)
    weights = save_model(
        target,
        model,
        params,
        tokenizer=finished.pipeline.tokenizer,
        label_names=finished.results.label_names,
        problem_type=finished.objective.task.problem_type,
    )
    pipeline = finished.pipeline
    save_beside(
        target, finished.objective.task.export_files(pipeline.rows, model.config.hidden_size), pipeline.tokenizer
    )
    log(
        f"merged model in {target} ({weights.stat().st_size / 1e6:.1f} MB); {model.torch_class}.from_pretrained('{target}') loads it"
    )
