"""Forgetting: how well a fine-tuned encoder still models masked words, on text that it was not trained on.

All runs are measured with the same masked-LM head: the checkpoint's own or, if it has none, a head trained on the frozen
base. Only the trained parameters inside the encoder are used with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpeft.config import AdapterConfig, DataConfig, RunConfig
from jaxpeft.errors import InputError
from jaxpeft.models.build import Model
from jaxpeft.runs.base_model import base_shapes, load_base
from jaxpeft.runs.data import load_data, row_options
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.load import TrainedRun, load_run
from jaxpeft.runs.train import run
from jaxpeft.tasks.base import Batch
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.training.evaluation import evaluate
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import make_eval_step
from jaxpeft.trees import Adapters, Params, beside_model, by_leaf, leaf_paths, nest, under, without_shared


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


def measure(run: Path, data: DataConfig, head: Path | None, max_rows: int) -> dict[str, float]:
    """Masked-LM perplexity of a finished run's encoder and of its base, on the test rows of `data`.

    If `data` has no test rows, the validation rows are read.

    Args:
        run: the run's directory.
        data: general text.
        head: a finished masked-LM run with adapter.method head on the same base; None if the checkpoint has a head.
        max_rows: maximum rows of `data.max_length` tokens to read.

    Returns:
        `before` (the base) and `after` (the run).

    Raises:
        InputError: there is no head.
    """
    finished = load_run(run)
    config = RunDirectory(run).read_config()
    task, splits = load_data(data, MaskedLM.name)
    # Method head freezes the whole base, so it is loaded as it was before the run.
    frozen, length = AdapterConfig(method="head"), data.max_length
    model, tokenizer = load_base(config.model, task, None, frozen, max_length=length, seed=config.seed)
    leaves = leaf_paths(model.params)
    if head is not None:
        leaves |= by_leaf(load_run(head).adapters["modules"])
    elif model.missing:
        raise InputError(f"the checkpoint of {config.model.name} has no masked-LM head to measure forgetting with")
    rows = task.make_data(
        splits.test or splits.validation,
        tokenizer,
        row_options(data),
        batch_size=config.evaluation.batch_size,
        seed=config.seed,
    )
    batches = list(rows.head(max_rows).eval_batches())
    nothing: Adapters = {"sites": {}, "modules": {}}
    after, adapters = _with_encoder(finished, model, leaves)
    return {
        "before": _perplexity(Objective(model, None, task), nest(leaves), nothing, batches),
        "after": _perplexity(Objective(model, finished.objective.method, task), after, adapters, batches),
    }


def _with_encoder(finished: TrainedRun, model: Model, leaves: dict[str, Any]) -> tuple[Params, Adapters]:
    """The masked-LM `leaves` with the encoder of `finished` in them, and its adapters inside the encoder."""
    encoder = [model.base_prefix]
    own = leaf_paths(without_shared(finished.frozen)[0]) | by_leaf(finished.adapters["modules"])
    changed = {path: leaf for path, leaf in own.items() if under(path, encoder) and path in leaves}
    sites = {path: params for path, params in finished.adapters["sites"].items() if path in model.sites()}
    return {**nest(leaves | changed), **beside_model(finished.frozen)}, {"sites": sites, "modules": {}}


def _perplexity(objective: Objective, frozen: Params, adapters: Adapters, batches: list[Batch]) -> float:
    parallel = data_parallel()
    frozen, adapters = parallel.replicate(frozen), parallel.replicate(adapters)
    step = make_eval_step(objective)
    return evaluate(objective.task, step, parallel, frozen, adapters, {}, batches)["perplexity"]
