"""What a run is made of, before its first update: data, base, adapters, how it is judged, and when what happens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import optax

from jaxpeft.config import RunConfig
from jaxpeft.data import PackedData, Splits
from jaxpeft.errors import InputError
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import Model
from jaxpeft.report.console import log
from jaxpeft.report.methods import method_name, options
from jaxpeft.report.results import describe_devices
from jaxpeft.runs.evaluator import Evaluator
from jaxpeft.runs.prepare import (
    Adapted,
    TrainingData,
    build_method,
    metric_names,
    prepare_adapters,
    prepare_model,
    prepare_optimizer,
    prepare_splits,
    prepare_state,
    prepare_training_data,
)
from jaxpeft.runs.schedule import make_plan
from jaxpeft.tasks.prediction import find_masks
from jaxpeft.training import multihost
from jaxpeft.training.checkpoint import hash_base
from jaxpeft.training.loop import Plan
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import DataParallel, data_parallel
from jaxpeft.training.step import TrainState
from jaxpeft.trees import Params, leaf_paths, nest


@dataclass(frozen=True)
class RunSetup:
    """The parts of one run. `adapted` is on the host's terms, `frozen` its base on all devices."""

    config: RunConfig
    parallel: DataParallel
    splits: Splits
    model: Model
    tokenizer: Any
    train_data: TrainingData
    adapted: Adapted
    base_hash: str
    frozen: Params
    objective: Objective
    judge: Evaluator
    plan: Plan
    optimizer: optax.GradientTransformationExtraArgs

    def fresh_state(self) -> TrainState:
        """The state before the first update, on all devices."""
        state = prepare_state(self.config, self.plan, self.optimizer, self.adapted.adapters, self.parallel)
        return self.parallel.replicate(state)

    def validate_start(self) -> dict[str, float]:
        """Metrics on the validation rows of what the run starts from, which is here also while and after it trains."""
        return self.judge.validate(self.frozen, self.parallel.replicate(self.adapted.adapters), {})


def setup_run(config: RunConfig) -> RunSetup:
    """Read, load and draw whatever `config` names; nothing is written.

    Raises:
        InputError: for whatever in the configuration or its files cannot be done.
    """
    with multihost.all_or_none():
        build_method(config)  # refuses what its options cannot mean, before anything is loaded
        parallel = data_parallel()
        parallel.check(config.training.batch_size, "training.batch_size")
        parallel.check(config.evaluation.batch_size, "evaluation.batch_size")

        splits = prepare_splits(config)
        model, tokenizer = prepare_model(config, splits.num_labels)
        train_data = prepare_training_data(config, splits.train, model, tokenizer, parallel.mesh.size)
        flash = choose_flash(config.model.attention, model, parallel.device, parallel.over_devices)
        adapted = prepare_adapters(config, model, tokenizer, texts_of(train_data).train_batch)
        base_hash = hash_base(adapted.frozen)
    multihost.check_equal(
        {"data": splits.digest, "base": lambda: base_hash, "adapter": lambda: hash_base(adapted.adapters)}
    )
    objective = Objective(model, adapted.method, splits.num_labels or 0, flash)
    plan = _plan(config, splits, train_data, adapted)
    if has_examples(config):
        find_masks(objective, tokenizer, config.evaluation.examples)  # refuses now, before the run's directory exists
    return RunSetup(
        config=config,
        parallel=parallel,
        splits=splits,
        model=model,
        tokenizer=tokenizer,
        train_data=train_data,
        adapted=adapted,
        base_hash=base_hash,
        frozen=parallel.replicate(adapted.frozen),
        objective=objective,
        judge=Evaluator.build(config, splits, tokenizer, objective, parallel),
        plan=plan,
        optimizer=prepare_optimizer(config, model, plan.learning_rate),
    )


def setup_replica(first: RunSetup, config: RunConfig) -> RunSetup:
    """The parts of a run that shares data and base with `first`, and trains together with it (`comparison.groups.sweep_key`).

    What `config` draws of its own is drawn as for a run alone; the rest is `first`'s.

    Raises:
        InputError: as `setup_run`, and where the two do not stand on one base.
    """
    splits, model = first.splits, first.model
    if config.seed != first.config.seed and model.missing:
        drawn = leaf_paths(prepare_model(config, splits.num_labels)[0].params)
        leaves = leaf_paths(model.params) | {path: drawn[path] for path in model.missing}
        model = replace(model, params=nest(leaves))
    train_data = first.train_data.with_seed(config.seed)
    adapted = prepare_adapters(config, model, first.tokenizer, texts_of(train_data).train_batch)
    if hash_base(adapted.frozen) != first.base_hash:
        raise InputError(f"'{config.run_name}' stands on another base than '{first.config.run_name}'; train it alone")
    objective, judge = first.objective, first.judge
    if adapted.method != first.adapted.method:
        objective = Objective(model, adapted.method, splits.num_labels or 0, first.objective.flash)
        judge = judge.of(objective)
    plan = _plan(config, splits, train_data, adapted)
    return replace(
        first,
        config=config,
        model=model,
        train_data=train_data,
        adapted=replace(adapted, frozen=first.adapted.frozen),
        objective=objective,
        judge=judge,
        plan=plan,
        optimizer=prepare_optimizer(config, model, plan.learning_rate),
    )


def _plan(config: RunConfig, splits: Splits, train_data: TrainingData, adapted: Adapted) -> Plan:
    metric = metric_names(config, splits.num_labels)[0]
    return make_plan(config, train_data.steps_per_epoch, metric, method=adapted.method)


def log_setup(parts: RunSetup) -> None:
    """Say what the run is made of, and what was done that nobody asked for."""
    config, model, splits, adapted = parts.config, parts.model, parts.splits, parts.adapted
    log(f"model  {model.source.name}, from {model.source.description}")
    if model.missing:
        modules = sorted({path.rpartition("/")[0].replace("/", ".") for path in model.missing})
        log(f"       not in the checkpoint, so drawn at random and trained whole: {', '.join(modules)}")
    log(f"data   {splits.source}")
    for note in splits.notes:
        log(f"       {note}")
    if adapted.method:
        said = ", ".join(f"{name} {value}" for name, value in options(adapted.method))
        where = f"{len(adapted.adapters['sites'])} layers with " if adapted.adapters["sites"] else ""
        log(f"adapts {where}{method_name(config)}" + (f": {said}" if said else ""))
    log(f"device {describe_devices()}")
    num_truncated = getattr(texts_of(parts.train_data), "num_truncated", 0)
    if num_truncated:
        log(f"       {num_truncated} training rows are longer than {config.data.max_length} tokens and were cut")


def texts_of(data: TrainingData) -> Any:
    """The data as it is without packing."""
    return data.unpacked if isinstance(data, PackedData) else data


def has_examples(config: RunConfig) -> bool:
    """Whether there are sentences to fill in before and after."""
    return config.task == "masked-lm" and bool(config.evaluation.examples)
