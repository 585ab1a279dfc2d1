"""One run, read top to bottom: data → model → adapters → optimizer → restore → loop → evaluation → export."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxpeft.compilation import keep_programs
from jaxpeft.config import RunConfig
from jaxpeft.config_file import differences, read_config, resolved, write_config
from jaxpeft.data import ClassificationData, PackedData, Splits
from jaxpeft.errors import InputError
from jaxpeft.interop.merged import save_model
from jaxpeft.interop.peft_files import BaseInfo, save_adapter
from jaxpeft.judge import Judge
from jaxpeft.merging import merge
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import Model
from jaxpeft.paths import Adapters, Layers, Params, count
from jaxpeft.plan import make_plan, with_length
from jaxpeft.predict import fill_masks, find_masks
from jaxpeft.prepare import (
    Adapted,
    build_method,
    metric_names,
    prepare_adapters,
    prepare_model,
    prepare_optimizer,
    prepare_splits,
    prepare_state,
    prepare_training_data,
)
from jaxpeft.report.card import write_card
from jaxpeft.report.curves import plot_curves
from jaxpeft.report.log import MetricsLog, read_metrics
from jaxpeft.report.methods import method_name, options
from jaxpeft.report.results import Results, describe_devices, measure, read_results, write_results
from jaxpeft.report.terminal import TrainingBar, before_after_table, say, silence
from jaxpeft.training import processes
from jaxpeft.training.checkpoint import Checkpoints, Progress, hash_base
from jaxpeft.training.feed import feed
from jaxpeft.training.interrupt import stop_requests
from jaxpeft.training.loop import Outcome, fit
from jaxpeft.training.objectives import Objective
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import TrainState, make_train_step


def run(config: RunConfig) -> Results:
    """Train, evaluate and export what `config` describes, in `output_dir/name`; return what was measured.

    Raises:
        InputError: for whatever in the configuration or its files cannot be done; nothing is overwritten.
        SystemExit: 128 + signal, after a checkpoint, where SIGTERM or Ctrl-C came.
    """
    _start(config)
    directory = Path(config.output_dir) / config.run_name
    processes.by_first(lambda: _check_directory(config, directory))
    with processes.all_or_none():
        build_method(config)  # refuses what its options cannot mean, before anything is loaded
        parallel = data_parallel()
        parallel.check(config.training.batch_size, "training.batch_size")
        parallel.check(config.evaluation.batch_size, "evaluation.batch_size")

        splits = prepare_splits(config)
        model, tokenizer = prepare_model(config, splits.num_labels)
        train_data = prepare_training_data(config, splits.train, model, tokenizer, parallel.mesh.size)
        flash = choose_flash(config.model.attention, model, parallel.device, parallel.over_devices)
        texts = train_data.unpacked if isinstance(train_data, PackedData) else train_data
        adapted = prepare_adapters(config, model, tokenizer, texts.train_batch)
        base_hash = hash_base(adapted.frozen)
    processes.check_equal(
        {"data": splits.digest, "base": lambda: base_hash, "adapter": lambda: hash_base(adapted.adapters)}
    )
    frozen = parallel.replicate(adapted.frozen)
    objective = Objective(model, adapted.method, splits.num_labels or 0, flash)
    judge = Judge.build(config, splits, tokenizer, objective, parallel)
    _announce(config, model, splits, adapted)
    if isinstance(texts, ClassificationData) and texts.num_truncated:
        say(f"       {texts.num_truncated} training rows are longer than {config.data.max_length} tokens and were cut")

    plan = make_plan(
        config, train_data.steps_per_epoch, metric_names(config, splits.num_labels)[0], method=adapted.method
    )
    optimizer = prepare_optimizer(config, model, plan)
    state = parallel.replicate(prepare_state(config, plan, optimizer, adapted.adapters, parallel))
    num_trainable, num_total = count(adapted.adapters), count(adapted.adapters) + count(frozen)

    if _has_examples(config):
        find_masks(objective, tokenizer, config.evaluation.examples)  # refuses now, before the run's directory exists

    processes.by_first(lambda: _make_directory(config, directory))
    processes.check_shared(directory / "config.yaml")
    checkpoints = Checkpoints(directory / "checkpoints", base_hash)
    state, progress = _restored(config, checkpoints, state)

    traces: Counter = Counter()
    norm = config.training.max_grad_norm
    train_step = make_train_step(objective, optimizer, traces, allocation=plan.allocation, max_grad_norm=norm)
    source = feed(train_data, parallel)
    with MetricsLog(directory, progress.update, writes=processes.is_first()) as log, stop_requests() as requested:
        if not progress.update:
            log.write(0, "validation", judge.validate(frozen, state.adapters, state.masks))
        with TrainingBar(progress.update, plan.num_steps) as bar, checkpoints.kept():
            outcome = fit(
                state,
                frozen,
                plan,
                progress=progress,
                draw_at=source.draw_at,
                train_steps=source.train_steps(train_step, plan.passes_per_dispatch),
                validate=lambda state: judge.validate(frozen, state.adapters, state.masks),
                checkpoints=checkpoints,
                log=log,
                bar=bar,
                stop_requested=processes.agreed(requested, parallel.largest),
            )
    if outcome.signal:
        _stop(config, directory, checkpoints, outcome)

    best = _best(checkpoints, outcome)
    checkpoints.close()
    # What it was before, too: the adapters it started from are still here, and training need not have waited.
    start = parallel.replicate(adapted.adapters)
    before, test = judge.test(frozen, start, {}), judge.test(frozen, best.adapters, best.masks)
    adapted = replace(adapted, method=with_length(adapted.method, plan.num_steps))
    answers_before = _examples(config, objective, frozen, start, {}, tokenizer)
    answers_after = _examples(config, objective, frozen, best.adapters, best.masks, tokenizer)
    best = replace(best, adapters=parallel.local(best.adapters), masks=parallel.local(best.masks))

    def write() -> Results:
        exported = _export(config, directory, model, adapted, parallel.local(frozen), best, tokenizer, splits)
        results = measure(
            config=config,
            model=model,
            splits=splits,
            outcome=outcome,
            masks=best.masks,
            adapters=best.adapters,
            frozen=parallel.local(frozen),
            num_total=num_total,
            num_trainable=num_trainable,
            before=before,
            test=test,
            exported=exported,
            traces=traces,
            examples=(answers_before, answers_after),
        )
        write_results(results, directory / "results.json")
        plot_curves(read_metrics(directory / "metrics.jsonl"), directory / "curves.png", config.run_name)
        write_card(exported.parent / "README.md", config, model, results)
        _conclude(config, directory, results)
        return results

    written = processes.by_first(write)
    processes.check_shared(directory / "results.json")
    return written or read_results(directory / "results.json")


def _start(config: RunConfig) -> None:
    """Join the other processes, where there are any, before anything touches a device; and find what earlier runs compiled."""
    if config.distributed:
        say("joining the other hosts; jax gives up after five minutes")
        processes.start(**vars(config.cluster))
    processes.check_started()
    with processes.all_or_none():
        keep_programs(config.compilation_cache, several_hosts=config.distributed)
    processes.check_equal({"configuration": lambda: f"{resolved(config)} {config.resume}"})
    if not processes.is_first():
        silence()


def _check_directory(config: RunConfig, directory: Path) -> None:
    resume = f"--config {directory}/config.yaml --resume"
    if not config.resume:
        if directory.exists() and any(directory.iterdir()):
            raise InputError(f"'{directory}' already holds a run; continue it with {resume}, or give another --name")
        return
    if not (directory / "config.yaml").is_file():
        raise InputError(
            f"nothing to resume in '{directory}'; start the run without --resume, or give the --name it had"
        )
    changed = differences(read_config(directory / "config.yaml"), config)
    if changed:
        raise InputError(
            f"'{directory}' was started with another configuration ({'; '.join(changed)}); resume with {resume}"
        )


def _make_directory(config: RunConfig, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_config(config, directory / "config.yaml")


def _restored(config: RunConfig, checkpoints: Checkpoints, state: TrainState) -> tuple[TrainState, Progress]:
    if not config.resume or checkpoints.latest is None:
        return state, Progress()
    state, progress = checkpoints.restore(state, checkpoints.latest)
    say(f"resumed after update {progress.update}")
    return state, progress


def _stop(config: RunConfig, directory: Path, checkpoints: Checkpoints, outcome: Outcome) -> None:
    checkpoints.close()
    say(f"stopped by a signal; update {outcome.progress.update} is saved. Go on with:")
    say(f"  python train.py --config {directory}/config.yaml --resume{' --distributed' if config.distributed else ''}")
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
    if not _has_examples(config):
        return None
    return fill_masks(objective, frozen, adapters, masks, tokenizer, config.evaluation.examples, top=3)


def _has_examples(config: RunConfig) -> bool:
    return config.task == "masked-lm" and bool(config.evaluation.examples)


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
    say(f"device {describe_devices()}")


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
