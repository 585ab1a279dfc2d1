"""Forgetting: how well a fine-tuned encoder still models masked words, on text that it was not trained on.

All runs are measured with the same masked-LM head: the checkpoint's own or, if it has none, a head trained on the frozen
base. Only the trained parameters inside the encoder are used with it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxpeft.config import AdapterConfig, DataConfig, PruningConfig, RunConfig
from jaxpeft.config.files import directory_of, read_config
from jaxpeft.errors import InputError
from jaxpeft.models.build import Model
from jaxpeft.runs.load import TrainedRun, load_run
from jaxpeft.runs.prepare import prepare_data, prepare_model, prepare_model_shapes, prepare_splits
from jaxpeft.runs.train import run
from jaxpeft.training.evaluation import evaluate_masked_lm
from jaxpeft.training.objective import Batch, Objective
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import make_eval_step
from jaxpeft.trees import SHARED, Adapters, Params, by_leaf, leaf_paths, nest, under, without_shared


def head_for(config: RunConfig) -> Path | None:
    """Train the masked-LM head of `config` on the frozen base, if it is not trained yet, and return the run's directory.

    Returns None if the base's checkpoint has a masked-LM head of its own.

    Raises:
        InputError: as `runs.train.run`.
    """
    directory = directory_of(config)
    if (directory / "results.json").is_file():
        return directory
    if not prepare_model_shapes(config, None).missing:
        return None
    run(config)
    return directory


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
    config = _with_everything_frozen(read_config(run / "config.yaml"), data)
    model, tokenizer = prepare_model(config, None)
    leaves = leaf_paths(model.params)
    if head is not None:
        leaves |= by_leaf(load_run(head).adapters["modules"])
    elif model.missing:
        raise InputError(f"the checkpoint of {config.model.name} has no masked-LM head to measure forgetting with")
    splits = prepare_splits(config)
    rows: Any = prepare_data(config, splits.test or splits.validation, tokenizer, config.evaluation.batch_size)
    batches = list(rows.head(max_rows).eval_batches())
    silent: Adapters = {"sites": {}, "modules": {}}
    after, adapters = _with_encoder(finished, model, leaves)
    return {
        "before": _perplexity(Objective(model, None), nest(leaves), silent, batches),
        "after": _perplexity(Objective(model, finished.objective.method), after, adapters, batches),
    }


def _with_everything_frozen(config: RunConfig, data: DataConfig) -> RunConfig:
    """The run's configuration with its base frozen, for masked language modelling on `data`."""
    return replace(
        config,
        task="masked-lm",
        data=data,
        adapter=AdapterConfig(method="head"),
        pruning=PruningConfig(),
        # The run's own values may be invalid for this task and method, and nothing is trained here.
        training=replace(config.training, metric=None, loraplus_lr_ratio=None),
    )


def _with_encoder(finished: TrainedRun, model: Model, leaves: dict[str, Any]) -> tuple[Params, Adapters]:
    """The masked-LM `leaves` with the encoder of `finished` in them, and its adapters inside the encoder."""
    encoder = [model.base_prefix]
    frozen, shared = without_shared(finished.frozen)
    own = leaf_paths(frozen) | by_leaf(finished.adapters["modules"])
    changed = {path: leaf for path, leaf in own.items() if under(path, encoder) and path in leaves}
    sites = {path: params for path, params in finished.adapters["sites"].items() if path in model.sites()}
    params = nest(leaves | changed)
    return {**params, SHARED: shared} if shared else params, {"sites": sites, "modules": {}}


def _perplexity(objective: Objective, frozen: Params, adapters: Adapters, batches: list[Batch]) -> float:
    parallel = data_parallel()
    frozen, adapters = parallel.replicate(frozen), parallel.replicate(adapters)
    step = make_eval_step(objective)
    return evaluate_masked_lm(step, parallel, frozen, adapters, {}, batches)["perplexity"]
