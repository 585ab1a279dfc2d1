"""A finished run, loaded: its base with its best adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxpeft.config import RunConfig
from jaxpeft.errors import InputError
from jaxpeft.interop.peft.files import load_adapter
from jaxpeft.report.results import Results, read_results
from jaxpeft.runs.adapters import build_method
from jaxpeft.runs.base_model import load_base
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.tasks import task_for
from jaxpeft.tasks.base import Answers
from jaxpeft.training.objective import Objective
from jaxpeft.training.prediction import predict
from jaxpeft.trees import Adapters, Params


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
        """For masked-lm: text → mask → (token, probability), most likely first; for classification: text → (label, probability)."""
        return predict(
            self.objective,
            self.frozen,
            self.adapters,
            {},
            self.tokenizer,
            texts,
            label_names=self.results.label_names,
            top=top,
        )


def load_run(directory: Path | str) -> TrainedRun:
    """Load the run in `directory` with its best adapter.

    Raises:
        InputError: if there is no run, or it has not finished.
    """
    files = RunDirectory(Path(directory))
    if not files.path.is_dir():
        raise InputError(f"no such run: '{files}'")
    config = files.read_config()
    if not files.is_finished:
        raise InputError(f"the run in '{files}' has not finished; continue it with {files.resume_flags}")
    results = read_results(files.results)
    is_full = config.adapter.method == "full"
    own_base = files.model if is_full else files.base if config.model.weights == "random" else None
    if own_base:
        # What was fine-tuned whole, or drawn at random, is a file of the run: another machine would draw other last digits.
        config = replace(config, model=replace(config.model, name=str(own_base), weights="pretrained"))
    task = task_for(config.task, results.num_labels)
    method = build_method(config.adapter)
    length = config.data.max_length
    model, tokenizer = load_base(config.model, task, method, config.adapter, max_length=length, seed=config.seed)
    frozen: Params = model.params
    adapters: Adapters = {"sites": {}, "modules": {}}
    loaded = None
    if not is_full:
        frozen, adapters, loaded = load_adapter(files.adapter, model.params)
    return TrainedRun(files.path, config, results, Objective(model, loaded, task), frozen, adapters, tokenizer)
