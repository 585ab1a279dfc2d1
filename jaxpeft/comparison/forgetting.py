"""Forgetting: how well a fine-tuned encoder still models masked words, on text that it was not trained on.

All runs are measured with the same masked-LM head: the checkpoint's own or, if it has none, a head trained on the frozen
base. Only the trained parameters inside the encoder are used with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, RunConfig
from jaxpeft.errors import InputError
from jaxpeft.models.build import Model
from jaxpeft.runs.base_model import base_shapes, load_base
from jaxpeft.runs.data import load_data, text_pipeline
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.load import TrainedRun, load_run
from jaxpeft.runs.train import run
from jaxpeft.tasks.base import Batch, Task
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.training.evaluation import evaluate
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import make_eval_step
from jaxpeft.trees import (
    CONSTANTS,
    Adapters,
    Params,
    below,
    beside_model,
    by_leaf,
    leaf_paths,
    nest,
    under,
    without_shared,
)


def head_for(config: RunConfig) -> Path | None:
    """Train the masked-LM head of `config` on the frozen base, if it is not trained yet, and return the run's directory.

    Returns None if the base's checkpoint has a masked-LM head of its own.

    Raises:
        InputError: as `runs.train.run`.
    """
    directory = RunDirectory.of(config)
    if directory.is_finished:
        return directory.path
    length = config.data.max_length
    if not base_shapes(config.model, MaskedLM(), None, config.adapter, max_length=length).missing:
        return None
    run(config)
    return directory.path


@dataclass(frozen=True)
class Reference:
    """The base with which the runs of one seed are compared.

    Attributes:
        task: masked language modelling.
        model: the base.
        leaves: the base's parameters with the masked-LM head, by path.
        batches: the rows of general text.
        perplexity: the base's.
    """

    task: Task
    model: Model
    leaves: Mapping[str, Any]
    batches: Sequence[Batch]
    perplexity: float


def reference(
    base: ModelConfig, data: DataConfig, head: Path | None, *, max_rows: int, batch_size: int, seed: int
) -> Reference:
    """Measure the base of a run on the test rows of `data`, or on its validation rows if it has no test rows.

    Args:
        base: the run's base.
        data: general text.
        head: a finished masked-LM run with adapter.method head on the same base; None if the checkpoint has a head.
        max_rows: maximum rows of `data.max_length` tokens to read.
        batch_size: rows per batch.
        seed: the run's seed.

    Raises:
        InputError: there is no head.
    """
    task, splits = load_data(data, MaskedLM.name)
    # Method head freezes the whole base, so it is loaded as it was before the run.
    frozen, length = AdapterConfig(method="head"), data.max_length
    model, tokenizer = load_base(base, task, None, frozen, max_length=length, seed=seed)
    leaves = leaf_paths(model.params)
    if head is not None:
        leaves |= by_leaf(load_run(head).adapters["modules"])
    elif model.missing:
        raise InputError(f"the checkpoint of {base.name} has no masked-LM head to measure forgetting with")
    rows = task.make_data(
        splits.test or splits.validation,
        text_pipeline(data, model, tokenizer),
        batch_size=batch_size,
        seed=seed,
    )
    batches = list(rows.head(max_rows).eval_batches())
    nothing: Adapters = {"sites": {}, "modules": {}}
    before = _perplexity(Objective(model, None, task), nest(leaves), nothing, batches)
    return Reference(task, model, leaves, batches, before)


def measure(run: Path, base: Reference) -> dict[str, float]:
    """Masked-LM perplexity of the base (`before`) and of the encoder of the finished run in the directory `run` (`after`)."""
    finished = load_run(run)
    frozen, adapters = _with_encoder(finished, base.model, base.leaves)
    objective = Objective(base.model, finished.objective.method, base.task)
    return {"before": base.perplexity, "after": _perplexity(objective, frozen, adapters, base.batches)}


def _with_encoder(finished: TrainedRun, model: Model, leaves: Mapping[str, Any]) -> tuple[Params, Adapters]:
    """The masked-LM `leaves` with the encoder of `finished` in them, and its adapters inside the encoder."""
    # The paths of a model without a head do not begin with the encoder's name.
    above = "" if finished.objective.model.base_prefix else model.base_prefix
    own = leaf_paths(without_shared(finished.frozen)[0]) | by_leaf(finished.adapters["modules"])
    own = {below(above, path): leaf for path, leaf in own.items()}
    changed = {path: leaf for path, leaf in own.items() if under(path, [model.base_prefix]) and path in leaves}
    adapted = {below(above, path): params for path, params in finished.adapters["sites"].items()}
    sites = {path: params for path, params in adapted.items() if path in model.sites()}
    beside = beside_model(finished.frozen)
    if CONSTANTS in beside:
        beside[CONSTANTS] = {below(above, path): arrays for path, arrays in beside[CONSTANTS].items()}
    return {**nest({**leaves, **changed}), **beside}, {"sites": sites, "modules": {}}


def _perplexity(objective: Objective, frozen: Params, adapters: Adapters, batches: Sequence[Batch]) -> float:
    parallel = data_parallel()
    frozen, adapters = parallel.replicate(frozen), parallel.replicate(adapters)
    step = make_eval_step(objective)
    return objective.task.measure(*evaluate(step, parallel, frozen, adapters, {}, batches, objective.task.gathered))[
        "perplexity"
    ]
