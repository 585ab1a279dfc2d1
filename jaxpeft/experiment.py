"""One run, read top to bottom: data → model → adapters → optimizer → restore → loop → evaluation → export."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpeft.config import RunConfig
from jaxpeft.config_file import differences, read_config, write_config
from jaxpeft.data import ClassificationData, Splits
from jaxpeft.errors import InputError
from jaxpeft.interop.merged import save_model
from jaxpeft.interop.peft_files import BaseInfo, save_adapter
from jaxpeft.judge import Judge
from jaxpeft.merging import merge
from jaxpeft.models.build import Model
from jaxpeft.paths import Adapters, Layers, Params, count
from jaxpeft.plan import make_plan, with_length
from jaxpeft.predict import fill_masks
from jaxpeft.prepare import (
    Adapted,
    build_method,
    lora_plus,
    metric_names,
    prepare_adapters,
    prepare_data,
    prepare_model,
    prepare_splits,
)
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.report.card import write_card
from jaxpeft.report.curves import plot_curves
from jaxpeft.report.log import MetricsLog, read_metrics
from jaxpeft.report.methods import method_name, options
from jaxpeft.report.results import Results, measure, write_results
from jaxpeft.report.terminal import TrainingBar, before_after_table, say
from jaxpeft.training.checkpoint import Checkpoints, Progress, hash_base
from jaxpeft.training.interrupt import stop_requests
from jaxpeft.training.loop import Outcome, fit
from jaxpeft.training.objectives import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import TrainState, init_state, make_train_step


def run(config: RunConfig) -> Results:
    """Train, evaluate and export what `config` describes, in `output_dir/name`; return what was measured.

    Raises:
        InputError: for whatever in the configuration or its files cannot be done; nothing is overwritten.
        SystemExit: 128 + signal, after a checkpoint, where SIGTERM or Ctrl-C came.
    """
    directory = _check_directory(config)
    build_method(config)  # refuses what its options cannot mean, before anything is loaded
    parallel = data_parallel()
    parallel.check(config.training.batch_size, "training.batch_size")
    parallel.check(config.evaluation.batch_size, "evaluation.batch_size")

    splits = prepare_splits(config)
    model, tokenizer = prepare_model(config, splits.num_labels)
    train_data = prepare_data(config, splits.train, tokenizer, config.training.batch_size)
    adapted = prepare_adapters(config, model, tokenizer, train_data.train_batch)
    frozen = parallel.replicate(adapted.frozen)
    objective = Objective(model, adapted.method, splits.num_labels or 0)
    judge = Judge.build(config, splits, tokenizer, objective, parallel)
    _announce(config, model, splits, adapted)
    if isinstance(train_data, ClassificationData) and train_data.num_truncated:
        say(
            f"       {train_data.num_truncated} training rows are longer than {config.data.max_length} tokens and were cut"
        )

    plan = make_plan(
        config, train_data.steps_per_epoch, metric_names(config, splits.num_labels)[0], method=adapted.method
    )
    allocation = plan.pruning if isinstance(plan.pruning, Allocation) else None
    optimizer = build_optimizer(
        plan.learning_rate,
        weight_decay=config.training.weight_decay,
        max_grad_norm=config.training.max_grad_norm,
        accumulation_steps=config.training.accumulation_steps,
        lora_plus=lora_plus(config, model),
    )
    dropout_rng = jax.random.fold_in(jax.random.key(config.seed), 1)
    pruned = plan.pruning is not None and allocation is None
    state = parallel.replicate(
        init_state(adapted.adapters, optimizer, dropout_rng, pruned=pruned, allocated=allocation is not None)
    )
    num_trainable, num_total = count(adapted.adapters), count(adapted.adapters) + count(frozen)

    # Before any training, also where a run is resumed; and before its directory exists: a sentence may be refused.
    start = parallel.replicate(adapted.adapters)
    answers_before = _examples(config, objective, frozen, start, {}, tokenizer)
    before = judge.test(frozen, start, {})

    directory.mkdir(parents=True, exist_ok=True)
    write_config(config, directory / "config.yaml")
    checkpoints = Checkpoints(directory / "checkpoints", hash_base(frozen))
    state, progress = _restored(config, checkpoints, state)

    traces: Counter = Counter()
    with MetricsLog(directory, progress.update) as log, stop_requests() as requested:
        if not progress.update:
            log.write(0, "validation", judge.validate(frozen, state.adapters, state.masks))
        with TrainingBar(progress.update, plan.num_steps) as bar:
            outcome = fit(
                state,
                frozen,
                plan,
                progress=progress,
                batch_at=train_data.train_batch,
                train_step=make_train_step(
                    objective,
                    optimizer,
                    traces,
                    allocation=allocation,
                    max_grad_norm=config.training.max_grad_norm,
                ),
                validate=lambda state: judge.validate(frozen, state.adapters, state.masks),
                checkpoints=checkpoints,
                parallel=parallel,
                log=log,
                bar=bar,
                stop_requested=requested,
            )
    if outcome.signal:
        _stop(config, directory, checkpoints, outcome)

    best = _best(checkpoints, outcome)
    checkpoints.close()
    test = judge.test(frozen, best.adapters, best.masks)
    adapted = replace(adapted, method=with_length(adapted.method, plan.num_steps))
    exported = _export(config, directory, model, adapted, frozen, best, tokenizer, splits)
    results = measure(
        config=config,
        model=model,
        splits=splits,
        outcome=outcome,
        masks=best.masks,
        adapters=best.adapters,
        frozen=frozen,
        num_total=num_total,
        num_trainable=num_trainable,
        before=before,
        test=test,
        exported=exported,
        traces=traces,
        examples=(answers_before, _examples(config, objective, frozen, best.adapters, best.masks, tokenizer)),
    )
    write_results(results, directory / "results.json")
    plot_curves(read_metrics(directory / "metrics.jsonl"), directory / "curves.png", config.run_name)
    write_card(exported.parent / "README.md", config, model, results)
    _conclude(config, directory, results)
    return results


def _check_directory(config: RunConfig) -> Path:
    directory = Path(config.output_dir) / config.run_name
    resume = f"--config {directory}/config.yaml --resume"
    if not config.resume:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(f"'{directory}' already holds a run; continue it with {resume}, or give another --name")
        return directory
    if not (directory / "config.yaml").is_file():
        raise InputError(
            f"nothing to resume in '{directory}'; start the run without --resume, or give the --name it had"
        )
    changed = differences(read_config(directory / "config.yaml"), config)
    if changed:
        raise InputError(
            f"'{directory}' was started with another configuration ({'; '.join(changed)}); resume with {resume}"
        )
    return directory


def _restored(config: RunConfig, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, Progress]:
    if not config.resume or checkpoints.latest is None:
        return state, Progress()
    state, progress = checkpoints.restore(state, checkpoints.latest)
    say(f"resumed after update {progress.update}")
    return state, progress


def _stop(config: RunConfig, directory: Path, checkpoints: Checkpoints, outcome: Outcome) -> None:
    checkpoints.close()
    say(f"stopped by a signal; update {outcome.progress.update} is saved. Go on with:")
    say(f"  python train.py --config {directory}/config.yaml --resume")
    assert outcome.signal is not None
    sys.exit(128 + outcome.signal)


def _best(checkpoints: Checkpoints, outcome: Outcome) -> TrainState:
    update = outcome.progress.best_update
    if update is None or update == outcome.progress.update:
        return outcome.state
    return checkpoints.restore(outcome.state, update)[0]


def _examples(
    config: RunConfig, objective: Objective, frozen: Params, adapters: Adapters, masks: Layers, tokenizer: Any
) -> list | None:
    texts = config.evaluation.examples
    if config.task != "masked-lm" or not texts:
        return None
    return fill_masks(objective, frozen, adapters, masks, tokenizer, texts, top=3)


def _export(
    config: RunConfig,
    directory: Path,
    model: Model,
    adapted: Adapted,
    frozen: Any,
    best: TrainState,
    tokenizer: Any,
    splits: Splits,
) -> Path:
    """Write what serves: the adapter in PEFT's files, or, where everything trained, the model. Returns the weights' file."""
    if config.model.weights == "random":
        # Nobody else has this base: without it the adapter means nothing.
        start = merge(model.params, {**adapted.adapters, "sites": {}})
        save_model(directory / "base", model, start, tokenizer=tokenizer, label_names=splits.label_names)
    if config.adapter.method == "full":
        params = merge(frozen, best.adapters)
        return save_model(directory / "model", model, params, tokenizer=tokenizer, label_names=splits.label_names)
    return save_adapter(
        directory / "adapter",
        best.adapters,
        adapted.method,
        base=BaseInfo.of(model, str((directory / "base").absolute()) if config.model.weights == "random" else None),
        frozen=frozen,
        start=adapted.adapters,
        masks=best.masks,
        target_modules=adapted.target_modules,
        exclude_modules=config.adapter.exclude_modules,
    )


def _announce(config: RunConfig, model: Model, splits: Splits, adapted: Adapted) -> None:
    say(f"model  {model.source.name}, from {model.source.description}")
    if model.missing:
        modules = sorted({path.rpartition("/")[0].replace("/", ".") for path in model.missing})
        say(f"       not in the checkpoint, so drawn at random and trained whole: {', '.join(modules)}")
    say(f"data   {splits.source}")
    for note in splits.notes:
        say(f"       {note}")
    if adapted.method:
        said = ", ".join(f"{name} {value}" for name, value in options(adapted.method))
        where = f"{len(adapted.adapters['sites'])} layers with " if adapted.adapters["sites"] else ""
        say(f"adapts {where}{method_name(config)}" + (f": {said}" if said else ""))
    devices = jax.local_devices()
    say(f"device {len(devices)} × {devices[0].device_kind}")


def _conclude(config: RunConfig, directory: Path, results: Results) -> None:
    before_after_table(results.table())
    for text, was, now in results.example_rows():
        say(f"{text}\n    before: {was}\n    after:  {now}")
    shapes = ", ".join(results.compiled_shapes)
    say(f"compiled {len(results.compiled_shapes)} training programs, one for each shape of a batch: {shapes}")
    say(
        f"\nfiles in {directory}: adapter, model card, curves.png, results.json, metrics.jsonl, config.yaml, checkpoints"
    )
    say("next:")
    say(f"  python -m jaxpeft predict {directory} {results.sentence()!r}")
    if config.adapter.method != "prompt-tuning":  # it changes the input, which no merged weights do
        say(f"  python -m jaxpeft merge {directory} merged-model")
