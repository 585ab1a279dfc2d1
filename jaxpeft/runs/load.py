"""Load a finished run: its base with its best adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

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
    """A finished run in memory: its base with its best adapter.

    Attributes:
        directory: the run's directory.
        config: its configuration. `model` names the run's own base if it wrote one.
        results: its measurements.
        objective: computes logits from `frozen` and `adapters`.
        frozen: the base's parameters.
        adapters: the best adapter.
        tokenizer: the base's tokenizer.
    """

    directory: Path
    config: RunConfig
    results: Results
    objective: Objective
    frozen: Params
    adapters: Adapters
    tokenizer: Any

    def predict(self, texts: Sequence[str], *, top: int = 5) -> list[list[Answers]] | list[Answers]:
        """The `top` most likely answers to each of `texts`, most likely first.

        Returns:
            for masked-lm, per text and mask a list of (token, probability); for classification, per text a list of
            (label, probability); for regression, per text a list of one ("value", number).

        Raises:
            InputError: a text is too long or, for masked-lm, has no mask.
        """
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
        InputError: there is no run in `directory`, or it has not finished.
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
        # A base that was fully trained or initialised at random is read from the run's own files. A random base cannot be drawn
        # again, because the last digits would differ on another machine.
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
    objective = Objective(model, loaded, task, on_cpu=jax.default_backend() == "cpu")
    return TrainedRun(files.path, config, results, objective, frozen, adapters, tokenizer)
