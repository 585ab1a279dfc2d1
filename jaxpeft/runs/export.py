"""The end of a run: test its best adapter, export it, and describe it in a model card."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxpeft.contextual.overlap import Overlap, channel_overlap
from jaxpeft.data import Split
from jaxpeft.interop.peft.files import BaseInfo, save_adapter
from jaxpeft.interop.transformers_files import save_beside, save_model
from jaxpeft.merging import merge
from jaxpeft.models.label_maps import save_label_names
from jaxpeft.report.card import write_card
from jaxpeft.report.card_subject import CardSubject
from jaxpeft.report.confusion import plot_confusion
from jaxpeft.report.console import before_after_table, log
from jaxpeft.report.curves import plot_curves
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.report.results import Results, measure, read_results, write_results
from jaxpeft.report.sparsity import plot_sparsity, read_records
from jaxpeft.runs.data import without_packing
from jaxpeft.runs.directory import RunDirectory
from jaxpeft.runs.schedule import with_length
from jaxpeft.runs.setup import RunSetup
from jaxpeft.training import multihost
from jaxpeft.training.checkpoint import Checkpoints
from jaxpeft.training.loop import Outcome
from jaxpeft.training.prediction import answer
from jaxpeft.training.step import TrainState
from jaxpeft.training.throughput import seconds_compiling
from jaxpeft.trees import ESTIMATORS, Adapters, Layers, count


def finalize(
    setup: RunSetup,
    outcome: Outcome,
    checkpoints: Checkpoints,
    traces: Counter,
    *,
    compiled_before: float,
    trained_together: int = 1,
) -> Results:
    """Test the best and the initial adapter of a run that has ended, write all its files, and return its results.

    Args:
        setup: the run.
        outcome: the end of its training.
        checkpoints: its checkpoints. They are closed here.
        traces: the compiled training programs, counted by batch shape.
        compiled_before: the value of `seconds_compiling` at the beginning of the run.
        trained_together: the number of runs that shared its program.
    """
    parallel, directory, evaluation = setup.parallel, setup.directory, setup.config.evaluation
    best = _best(checkpoints, outcome)
    checkpoints.close()
    # The initial adapters are still in memory, so they are tested here, and training need not wait for it.
    start = parallel.replicate(setup.adapted.adapters)
    before = setup.evaluator.test(setup.frozen, start, {})[0] if evaluation.before else {}
    evaluator = setup.evaluator.calibrated(setup.frozen, best.adapters, best.masks)
    test, classes = evaluator.test(setup.frozen, best.adapters, best.masks)
    answers = _examples(setup, start, best)
    best = replace(best, adapters=parallel.local(best.adapters), masks=parallel.local(best.masks))
    frozen = dict(parallel.local(setup.frozen))
    estimators = frozen.pop(ESTIMATORS, {})  # they served training, and are no part of the model
    num_trainable = count(setup.adapted.adapters)

    def write() -> Results:
        exported = _export(setup, frozen, best)
        results = measure(
            name=setup.config.run_name,
            task=setup.config.task,
            method=setup.config.adapter.method,
            best_metric=setup.plan.metric,
            evaluation=evaluation,
            model=setup.model,
            splits=setup.splits,
            reads_pairs=bool(setup.pipeline.reads_pairs),
            outcome=outcome,
            masks=best.masks,
            adapters=best.adapters,
            frozen=frozen,
            num_total=num_trainable + count(frozen),
            num_trainable=num_trainable,
            before=before,
            test=test,
            classes=classes,
            calibration=evaluator.task.calibration,
            loss_options=setup.task.loss_options(setup.splits.label_names),
            exported=exported,
            traces=traces,
            examples=answers,
            compile_seconds=seconds_compiling() - compiled_before,
            trained_together=trained_together,
            channel_overlap=_channel_overlap(setup, estimators),
        )
        plot_curves(read_metrics(directory.metrics), directory.curves, setup.config.run_name)
        write_card(
            CardSubject(
                exported.parent,
                setup.config,
                evaluator.task,
                setup.model,
                setup.method,
                results,
                warmup_steps=setup.plan.warmup_steps,
                drawn_base=directory.base if _is_drawn(setup) else None,
                masks=_draw_masks(directory, exported.parent, setup.config.run_name),
                confusion=_draw_confusion(directory, exported.parent, results),
            )
        )
        write_results(results, directory.results)
        return results

    written = multihost.on_process_0(write)
    multihost.check_shared(directory.results)
    return written or read_results(directory.results)


def show(setup: RunSetup, results: Results) -> None:
    """Print the results, the run's directory, and the commands that use it."""
    before_after_table(results.table())
    for text, was, now in results.example_rows():
        log(f"{text}\n    before: {was}\n    after:  {now}")
    for name, value in results.calibration.items():
        log(f"{name} {value:.4g}, chosen on the validation rows")
    shapes = ", ".join(results.compiled_shapes)
    dense = setup.plan.dense_steps
    first = f"; the first {dense} steps, which are dense, have programs of their own" if dense else ""
    log(f"compiled {len(results.compiled_shapes)} training programs, one for each shape of a batch: {shapes}{first}")
    directory = setup.directory
    masks = (directory.sparsity_picture, directory.sparsity) if directory.sparsity.is_file() else ()
    confusion = (directory.confusion,) if results.confusion else ()
    files = (
        directory.curves,
        *masks,
        *confusion,
        directory.results,
        directory.metrics,
        directory.config,
        directory.checkpoints,
    )
    log(f"\nfiles in {directory}: adapter, model card, {', '.join(path.name for path in files)}")
    log("next:")
    pair = "" if results.pair() is None else f" --pairs {results.pair()!r}"
    log(f"  python -m jaxpeft predict {directory} {results.sentence()!r}{pair}")
    if setup.objective.virtual_tokens == 0:  # virtual tokens are added to the input and cannot be merged into weights
        log(f"  python -m jaxpeft merge {directory} merged-model")


def _best(checkpoints: Checkpoints, outcome: Outcome) -> TrainState:
    step = outcome.progress.best_step
    if step is None or step == outcome.progress.step:
        return outcome.state
    return checkpoints.restore(outcome.state, step)[0]


def _draw_masks(directory: RunDirectory, export: Path, title: str) -> Path | None:
    """Draw the log of the masks, if the run wrote one; return the copy of the picture in the directory of the exported files."""
    records = read_records(directory.sparsity)
    if not records:
        return None
    picture = plot_sparsity(records, directory.sparsity_picture, title)
    return Path(shutil.copy(picture, export / picture.name))


def _draw_confusion(directory: RunDirectory, export: Path, results: Results) -> Path | None:
    """Draw which classes are taken for which, if the run has some; return the copy of the picture beside the model card."""
    if not results.confusion:
        return None
    names = [figures["name"] for figures in results.classes]
    title = f"{results.name}, {results.test_split}"
    picture = plot_confusion(results.confusion, names, directory.confusion, title)
    return Path(shutil.copy(picture, export / picture.name))


def _examples(setup: RunSetup, start: Adapters, best: TrainState) -> tuple[list | None, list | None]:
    """The answers to the example sentences before and after training; None if there are no sentences."""
    texts = setup.examples
    if not texts:
        return None, None
    questions = setup.task.make_questions(Split(texts), setup.pipeline, batch_size=len(texts), top=3)
    logits = jax.jit(setup.objective.logits)

    def answers(adapters: Adapters, masks: Layers) -> list:
        return answer(questions, lambda batch: logits(setup.frozen, adapters, masks, batch))

    return answers(start, {}), answers(best.adapters, best.masks)


def _channel_overlap(setup: RunSetup, estimators: Layers) -> Overlap:
    """How good the choice of channels was, on the first training batch; {} if the run did not choose by estimates."""
    if not estimators or setup.objective.contextual is None:
        return {}
    batch = without_packing(setup.train_data).train_batch(0)
    layers = setup.objective.contextual.sparse_layers
    return channel_overlap(setup.model, setup.model.params, estimators, batch, layers=layers)


def _is_drawn(setup: RunSetup) -> bool:
    """True if the base's weights were drawn at random, so that only this run has them."""
    return setup.config.model.weights == "random"


def _export(setup: RunSetup, frozen: Any, best: TrainState) -> Path:
    """Write the adapter in PEFT's files, or the model after full fine-tuning. Returns the path of the weights."""
    config, model, adapted, directory = setup.config, setup.model, setup.adapted, setup.directory
    also: dict[str, Any] = {
        "tokenizer": setup.pipeline.tokenizer,
        "label_names": setup.splits.label_names,
        "problem_type": setup.task.problem_type,
    }
    files = setup.task.export_files(setup.pipeline.rows, model.config.hidden_size)
    if _is_drawn(setup):
        # No other place has this base, and the adapter is useless without it.
        save_model(directory.base, model, merge(model.params, {**adapted.adapters, "sites": {}}), **also)
    if config.adapter.method == "full":
        weights = save_model(directory.model, model, merge(frozen, best.adapters), **also)
        save_beside(directory.model, files, setup.pipeline.tokenizer)
        return weights
    weights = save_adapter(
        directory.adapter,
        best.adapters,
        with_length(adapted.method, setup.plan.num_steps),
        base=BaseInfo.of(model, str(directory.base.absolute()) if _is_drawn(setup) else None),
        frozen=frozen,
        start=adapted.adapters,
        masks=best.masks,
        target_modules=adapted.target_modules,
        exclude_modules=config.adapter.exclude_modules,
    )
    # sentence-transformers 5.7 with transformers 4 reads config.json even beside an adapter.
    beside = {"config.json": model.config.to_dict(), **files} if files else {}
    save_beside(directory.adapter, beside, setup.pipeline.tokenizer)
    if setup.splits.label_names:
        save_label_names(directory.adapter, setup.splits.label_names)
    return weights
