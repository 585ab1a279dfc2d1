"""Working with a finished run: load it, evaluate, predict, merge."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxpeft.config import RunConfig
from jaxpeft.config.files import read_config
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.files import load_adapter
from jaxpeft.interop.transformers_files import new_directory, save_model
from jaxpeft.merging import merge as merge_trees
from jaxpeft.quantization import is_quantized
from jaxpeft.report.console import log
from jaxpeft.report.results import NAMES, Results, read_results, show
from jaxpeft.runs.evaluator import Evaluator
from jaxpeft.runs.prepare import prepare_model, prepare_splits
from jaxpeft.tasks.prediction import Answers, classify, fill_masks
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import data_parallel
from jaxpeft.trees import Adapters, Params, leaf_paths


@dataclass(frozen=True)
class TrainedRun:
    """A run's base with its best adapter."""

    directory: Path
    config: RunConfig
    results: Results
    objective: Objective
    frozen: Params
    adapters: Adapters
    tokenizer: Any

    def predict(self, texts: Sequence[str], *, top: int = 5) -> list[list[Answers]] | list[Answers]:
        """For masked-lm: text → mask → (token, probability), likeliest first; for classification: text → (label, probability)."""
        args: tuple = (self.objective, self.frozen, self.adapters, {}, self.tokenizer, texts)
        if self.config.task == "masked-lm":
            return fill_masks(*args, top=top)
        return classify(*args, label_names=self.results.label_names, top=top)


def load_run(directory: Path | str) -> TrainedRun:
    """Load the run in `directory` with its best adapter.

    Raises:
        InputError: where there is no run, or it has not finished.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"no such run: '{directory}'")
    config = read_config(directory / "config.yaml")
    if not (directory / "results.json").is_file():
        raise InputError(
            f"the run in '{directory}' has not finished; continue it with --config {directory}/config.yaml --resume"
        )
    results = read_results(directory / "results.json")
    own_base = "model" if config.adapter.method == "full" else "base" if config.model.weights == "random" else None
    if own_base:
        # What was fine-tuned whole, or drawn at random, is a file of the run: another machine would draw other last digits.
        files = replace(config.model, name=str(directory / own_base), weights="pretrained")
        config = replace(config, model=files)
    model, tokenizer = prepare_model(config, results.num_labels)
    frozen: Params = model.params
    adapters: Adapters = {"sites": {}, "modules": {}}
    method = None
    if config.adapter.method != "full":
        frozen, adapters, method = load_adapter(directory / "adapter", model.params)
    objective = Objective(model, method, results.num_labels or 0)
    return TrainedRun(directory, config, results, objective, frozen, adapters, tokenizer)


def evaluate(run: str, split: str, pseudo_perplexity: bool, pseudo_perplexity_rows: int) -> None:
    """Print the metrics of a run's best adapter on its validation or test rows."""
    finished = load_run(run)
    config = finished.config
    if pseudo_perplexity and config.task != "masked-lm":
        raise InputError(f"pseudo-perplexity is a masked-lm figure, and '{run}' is a {config.task} run")
    evaluation = replace(
        config.evaluation, pseudo_perplexity=pseudo_perplexity, pseudo_perplexity_rows=pseudo_perplexity_rows
    )
    splits = prepare_splits(config)
    if split == "test" and splits.test is None:
        log("there is no labelled test split: measuring on validation")
    if split == "validation":
        splits = replace(splits, test=splits.validation)
    parallel = data_parallel()
    judge = Evaluator.build(
        replace(config, evaluation=evaluation), splits, finished.tokenizer, finished.objective, parallel
    )
    for name, value in judge.test(finished.frozen, finished.adapters, {}).items():
        log(f"{NAMES.get(name, name):24} {show(name, value)}")


def merge(run: str, output: str, requantize: bool = False) -> None:
    """Write a run's base with the adapter merged in, as a transformers model: in fp32, or quantised again as the base was."""
    target = new_directory(output)
    finished = load_run(run)
    model, method = finished.objective.model, finished.objective.method
    if requantize and not any(map(is_quantized, leaf_paths(finished.frozen).values())):
        raise InputError(f"--requantize true, and the base of '{run}' is not quantised; leave it out")
    if tied := model.tied_embeddings(finished.adapters["sites"]):
        raise InputError(
            f"the adapter of '{tied}' cannot be merged: the model's decoder is tied to it and would change too; serve it as an adapter"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = merge_trees(finished.frozen, finished.adapters, method, requantize=requantize)
    for warning in caught:
        log(f"warning: {warning.message}")
    weights = save_model(target, model, params, tokenizer=finished.tokenizer, label_names=finished.results.label_names)
    log(
        f"merged model in {target} ({weights.stat().st_size / 1e6:.1f} MB); {model.torch_class}.from_pretrained('{target}') loads it"
    )
