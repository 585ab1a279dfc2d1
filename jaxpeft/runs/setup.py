"""Set up a run before its first step. On the way from the command to the training loop, only this module reads the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import optax

from jaxpeft.adapters import Method
from jaxpeft.config import RunConfig, TrainingConfig
from jaxpeft.data import Split, Splits
from jaxpeft.errors import InputError
from jaxpeft.merging import check_has_zeros
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import Model
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.report.console import log
from jaxpeft.report.methods import method_name, options
from jaxpeft.report.results import describe_devices, loss_in_words
from jaxpeft.runs.adapters import Adapted, build_method, prepare_adapters
from jaxpeft.runs.base_model import load_base
from jaxpeft.runs.contextual import contextual_sparsity, estimators_of
from jaxpeft.runs.data import load_data, text_pipeline, training_data, without_packing
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.evaluator import Evaluator
from jaxpeft.runs.schedule import check_pruning, check_redraw, make_plan, pruner_of
from jaxpeft.tasks.base import Batch, Task
from jaxpeft.tasks.text_pipeline import TextPipeline
from jaxpeft.training import multihost
from jaxpeft.training.checkpoint import hash_base
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import LoraPlus, build_optimizer
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import DataParallel, data_parallel
from jaxpeft.training.step import TrainState, init_state
from jaxpeft.trees import ESTIMATORS, Params, constants_of, leaf_paths, nest


@dataclass(frozen=True)
class RunSetup:
    """All parts of one run. Each is built once.

    Attributes:
        config: the run's configuration.
        directory: the run's directory.
        task: the task, for the labels of this data.
        splits: texts and labels.
        model: the base, as loaded.
        pipeline: turns texts into rows; it has the tokenizer.
        method: the adapter method, as configured; None for the baselines.
        adapted: the base and its initial adapters. Its method also has the options that depend on the model.
        train_data: the training rows.
        parallel: the devices.
        base_hash: identifies the base.
        frozen: the base's parameters, on all devices, and the estimators if the run chooses channels by them.
        objective: the loss to minimise.
        evaluator: measures the adapters on the validation and test rows.
        plan: the steps at which the run logs, validates and prunes.
        optimizer: the optimizer of the adapters.
    """

    config: RunConfig
    directory: RunDirectory
    task: Task
    splits: Splits
    model: Model
    pipeline: TextPipeline
    method: Method | None
    adapted: Adapted
    train_data: Any
    parallel: DataParallel
    base_hash: str
    frozen: Params
    objective: Objective
    evaluator: Evaluator
    plan: Plan
    optimizer: optax.GradientTransformationExtraArgs

    @property
    def examples(self) -> list[str]:
        """Sentences to fill in before and after training. Empty if the task fills no masks."""
        return self.config.evaluation.examples if self.task.fills_masks else []

    def initial_state(self) -> TrainState:
        """The state before the first step, on all devices."""
        rng = dropout_key(self.config.seed, platform=self.parallel.device.platform, num_devices=self.parallel.mesh.size)
        return self.parallel.replicate(state_of(self.plan, self.optimizer, self.adapted, rng))

    def validate_start(self) -> dict[str, float]:
        """Validation metrics of the initial adapters."""
        return self.evaluator.validate(self.frozen, self.parallel.replicate(self.adapted.adapters), {})


def setup_run(config: RunConfig) -> RunSetup:
    """Read the data, load the base and initialise the adapters of the run that `config` describes. Nothing is written.

    Raises:
        InputError: the configuration, the data or the model's files are invalid or do not fit together.
    """
    t, m, length = config.training, config.model, config.data.max_length
    with multihost.all_or_none():
        method = build_method(config.adapter)  # first, because it checks the options without loading anything
        pruner_of(config.pruning, method)  # the same
        parallel = data_parallel()
        parallel.check(t.batch_size, "training.batch_size")
        if t.micro_batch_size != "auto":
            parallel.check(t.micro_batch_size, "training.micro_batch_size")
        parallel.check(config.evaluation.batch_size, "evaluation.batch_size")

        task, splits = load_data(config.data, config.task, config.model, config.task_options)
        task.check_metric(t.metric)
        task = task.for_training(splits, label_smoothing=t.label_smoothing, class_weights=t.class_weights)
        model, tokenizer = load_base(m, task, method, config.adapter, max_length=length, seed=config.seed)
        pipeline = text_pipeline(
            config.data,
            model,
            tokenizer,
            method=method,
            reads_pairs=task.reads_pairs and splits.train.pairs is not None,
            label_names=splits.label_names,
        )
        train_data = training_data(
            task,
            splits.train,
            model,
            pipeline,
            packing=config.data.packing,
            batch_size=t.batch_size,
            seed=config.seed,
            num_devices=parallel.mesh.size,
        )
        flash = choose_flash(m.attention, model, parallel.device, parallel.over_devices)
        adapted = prepare_adapters(
            config.adapter,
            method,
            task,
            model,
            seed=config.seed,
            tokenizer=tokenizer,
            tokenizer_name=m.tokenizer,
            batches=_batches(train_data),
        )
        if config.adapter.keep_base_zeros:
            share = check_has_zeros(adapted.frozen, adapted.adapters["sites"], "adapter.keep_base_zeros")
            log(f"base   {100 * share:.1f} % of the adapted weights are zero; the update leaves them at zero")
        base_hash = hash_base(adapted.frozen)
        directory, x = RunDirectory.of(config), config.contextual
        contextual = contextual_sparsity(x, model)
        kept = directory.estimators if config.resume else None
        estimators = estimators_of(contextual, model, rank=x.estimator_rank, kept=kept)
    multihost.check_equal(
        {"data": splits.digest, "base": lambda: base_hash, "adapter": lambda: hash_base(adapted.adapters)}
    )
    on_cpu = parallel.device.platform == "cpu"
    objective = Objective(model, adapted.method, task, flash, contextual, on_cpu)
    plan = make_plan(
        t,
        config.pruning,
        batches_per_epoch=train_data.batches_per_epoch,
        metric=task.metrics[0],
        method=adapted.method,
        dense_share=x.dense_share if contextual else 0.0,
        distributed=config.distributed,
    )
    check_pruning(plan, adapted.adapters)
    check_redraw(plan, adapted.frozen)
    if task.fills_masks and config.evaluation.examples:
        # An error must come before the run's directory exists.
        task.make_questions(Split(config.evaluation.examples), pipeline, batch_size=1, top=1)
    return RunSetup(
        config=config,
        directory=directory,
        task=task,
        splits=splits,
        model=model,
        pipeline=pipeline,
        method=method,
        adapted=adapted,
        train_data=train_data,
        parallel=parallel,
        base_hash=base_hash,
        frozen=parallel.replicate({**adapted.frozen, **({ESTIMATORS: estimators} if estimators else {})}),
        objective=objective,
        evaluator=Evaluator.build(config.evaluation, splits, pipeline, objective, parallel, seed=config.seed),
        plan=plan,
        optimizer=make_optimizer(t, method, model, plan.learning_rate),
    )


def setup_replica(first: RunSetup, config: RunConfig) -> RunSetup:
    """The setup of a run that shares data and base with `first`. Both must have the same `sweep_key`.

    Everything that depends on the run's seed is drawn as if the run trained by itself. The rest is taken from `first`.

    Raises:
        InputError: as `setup_run`, or the two runs have different bases.
    """
    t, task, model = config.training, first.task, first.model
    method = build_method(config.adapter)
    if config.seed != first.config.seed and model.missing:
        length = config.data.max_length
        drawn = load_base(config.model, task, method, config.adapter, max_length=length, seed=config.seed)[0]
        leaves = leaf_paths(drawn.params)
        missing = {path: leaves[path] for path in model.missing}
        model = replace(model, params=nest(leaf_paths(model.params) | missing))
    train_data = first.train_data.with_seed(config.seed)
    adapted = prepare_adapters(
        config.adapter,
        method,
        task,
        model,
        seed=config.seed,
        tokenizer=first.pipeline.tokenizer,
        tokenizer_name=config.model.tokenizer,
        batches=_batches(train_data),
    )
    if hash_base(adapted.frozen) != first.base_hash:
        raise InputError(f"'{config.run_name}' has another base than '{first.config.run_name}'; train it by itself")
    objective, evaluator = first.objective, first.evaluator
    if adapted.method != first.adapted.method:
        objective = replace(first.objective, model=model, method=adapted.method)
        evaluator = evaluator.with_objective(objective)
    plan = make_plan(
        t,
        config.pruning,
        batches_per_epoch=train_data.batches_per_epoch,
        metric=task.metrics[0],
        method=adapted.method,
        dense_share=config.contextual.dense_share if objective.contextual else 0.0,
        distributed=config.distributed,
    )
    check_pruning(plan, adapted.adapters)
    return replace(
        first,
        config=config,
        directory=RunDirectory.of(config),
        model=model,
        method=method,
        train_data=train_data,
        adapted=replace(adapted, frozen=first.adapted.frozen),
        objective=objective,
        evaluator=evaluator,
        plan=plan,
        optimizer=make_optimizer(t, method, model, plan.learning_rate),
    )


def make_optimizer(
    training: TrainingConfig, method: Method | None, model: Model, learning_rate: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """The run's optimizer. `learning_rate` is the schedule of the run's plan."""
    t, plus = training, None
    if t.loraplus_lr_ratio:
        embeddings = frozenset(path for path, site in model.sites().items() if site.kind == "embedding")
        parameters = method.loraplus if method else ()
        plus = LoraPlus(t.loraplus_lr_ratio, parameters, t.loraplus_lr_embedding / t.learning_rate, embeddings)
    return build_optimizer(
        learning_rate,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        accumulation_steps=t.accumulation_steps,
        undecayed=method.undecayed if method else (),
        lora_plus=plus,
        thresholds=method.thresholds if method else {},
    )


def state_of(plan: Plan, optimizer: optax.GradientTransformation, adapted: Adapted, rng: jax.Array) -> TrainState:
    """The state before the first step, not yet placed on devices.

    It has masks if `plan` prunes, importance if it allocates, and the indices of a sparse update if it redraws them.
    """
    allocated, redraws = plan.allocation is not None, isinstance(plan.pruning, Redraw)
    return init_state(
        adapted.adapters,
        optimizer,
        rng,
        pruned=plan.pruning is not None and not allocated and not redraws,
        allocated=allocated,
        remembers=plan.remembers,
        redrawn=constants_of(adapted.frozen) if redraws else None,
    )


def log_setup(setup: RunSetup) -> None:
    """Print the run's model, data, method and devices, and everything that was done without being asked for."""
    config, model, splits, adapted = setup.config, setup.model, setup.splits, setup.adapted
    log(f"model  {model.source.name}, from {model.source.description}")
    if model.missing:
        modules = sorted({path.rpartition("/")[0].replace("/", ".") for path in model.missing})
        why = "not in the checkpoint"
        if model.other_classes:
            why = f"the checkpoint's head has {model.other_classes} outputs and this data needs {setup.task.num_labels}"
        log(f"       {why}, so initialised at random and trained: {', '.join(modules)}")
    log(f"data   {splits.source}")
    for note in splits.notes:
        log(f"       {note}")
    if loss := setup.task.loss_options(splits.label_names):
        log(f"loss   {loss_in_words(loss)}")
    if adapted.method:
        said = ", ".join(f"{name} {value}" for name, value in options(adapted.method))
        where = f"{len(adapted.adapters['sites'])} layers with " if adapted.adapters["sites"] else ""
        log(
            f"adapts {where}{method_name(config.adapter, config.pruning, config.model, config.contextual)}"
            + (f": {said}" if said else "")
        )
    log(f"device {describe_devices()}")
    num_truncated = getattr(without_packing(setup.train_data), "num_truncated", 0)
    if num_truncated:
        log(f"       {num_truncated} training rows are longer than {config.data.max_length} tokens and were cut")
    for note in getattr(without_packing(setup.train_data), "notes", ()):
        log(f"       in training, {note}")


def _batches(train_data: Any) -> Callable[[int], Batch]:
    return without_packing(train_data).train_batch
