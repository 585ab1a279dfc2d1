"""The cost of a merge that keeps the zeros of its base: in the update, and in the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jaxpeft.errors import InputError
from jaxpeft.merging import dropped_updates
from jaxpeft.pruning.base_zeros import KeptZeros, dropped_in_total
from jaxpeft.quantization import is_quantized
from jaxpeft.runs.data import load_data
from jaxpeft.runs.evaluator import Evaluator
from jaxpeft.runs.load import TrainedRun
from jaxpeft.tasks.metrics import get_metric
from jaxpeft.training.sharding import data_parallel
from jaxpeft.trees import Params, leaf_paths

_BATCHES = 8
"""Validation batches that are measured: enough to see a model that broke, in seconds."""


def cost_of_keeping_zeros(run: TrainedRun, merged: Params) -> Iterator[str]:
    """Lines that say what `merged`, the run's model with the zeros of its base, lost against the run's adapter."""
    costs = dropped_updates(run.frozen, run.adapters, run.objective.method)
    width = max(map(len, costs))
    yield f"{'layer':{width}}  zeros in the base  dropped of the update's norm"
    for path, cost in costs.items():
        yield f"{path:{width}}  {_zeros(cost):>17}  {cost.dropped:.3f}"
    yield f"{'all layers':{width}}  {'':>17}  {dropped_in_total(costs.values()):.3f}"
    if any(map(is_quantized, leaf_paths(run.frozen).values())):
        yield "the base is quantised: weights that were rounded to zero count as its zeros, and stay zero"
    yield from _metrics(run, merged)


def _zeros(cost: KeptZeros) -> str:
    pattern = f" ({cost.pattern[0]}:{cost.pattern[1]})" if cost.pattern else ""
    return f"{100 * cost.zeros:.1f} %{pattern}"


def _metrics(run: TrainedRun, merged: Params) -> Iterator[str]:
    """The validation metrics of the adapter, and of `merged` without one."""
    config = run.config
    try:
        task, splits = load_data(config.data, config.task, config.model)
    except InputError as error:
        yield f"the metrics were not measured, because the run's data cannot be read: {error}"
        return
    options = replace(config.evaluation, max_batches=_BATCHES)
    splits = replace(splits, test=None)
    objective = replace(run.objective, task=replace(task, **run.results.calibration))
    adapted = Evaluator.build(options, splits, run.pipeline, objective, data_parallel(), seed=config.seed)
    plain = adapted.with_objective(replace(objective, method=None))
    before = adapted.validate(run.frozen, run.adapters, {})
    after = plain.validate(merged, {"sites": {}, "modules": {}}, {})
    yield f"on up to {_BATCHES} validation batches, before and after the zeros were put back:"
    for name, value in before.items():
        metric = get_metric(name)
        yield f"  {metric.title:24} {metric.in_words(value)} → {metric.in_words(after[name])}"
