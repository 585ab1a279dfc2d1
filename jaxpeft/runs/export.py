"""What a trained run leaves: its best adapter judged on the test rows, exported, and described."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxpeft.config.files import directory_of
from jaxpeft.interop.peft.files import BaseInfo, save_adapter
from jaxpeft.interop.transformers_files import save_model
from jaxpeft.merging import merge
from jaxpeft.report.card import write_card
from jaxpeft.report.console import before_after_table, log
from jaxpeft.report.curves import plot_curves
from jaxpeft.report.metrics_log import read_metrics
from jaxpeft.report.results import Results, measure, read_results, write_results
from jaxpeft.runs.schedule import with_length
from jaxpeft.runs.setup import RunSetup, has_examples
from jaxpeft.tasks.prediction import fill_masks
from jaxpeft.training import multihost
from jaxpeft.training.checkpoint import Checkpoints
from jaxpeft.training.loop import Outcome
from jaxpeft.training.step import TrainState
from jaxpeft.training.throughput import seconds_compiling
from jaxpeft.trees import Adapters, Layers, count


def finalize(
    parts: RunSetup,
    outcome: Outcome,
    checkpoints: Checkpoints,
    traces: Counter,
    *,
    compiled_before: float,
    trained_together: int = 1,
) -> Results:
    """Judge the best adapter of a run that has ended, and the one that it started from; write everything; return what was measured.

    `compiled_before` is what `seconds_compiling` said when the run began; `trained_together` how many runs shared its program.
    """
    config, parallel, directory = parts.config, parts.parallel, directory_of(parts.config)
    best = _best(checkpoints, outcome)
    checkpoints.close()
    # What it was before, too: the adapters it started from are still here, and training need not have waited.
    start = parallel.replicate(parts.adapted.adapters)
    before = parts.judge.test(parts.frozen, start, {}) if config.evaluation.before else {}
    test = parts.judge.test(parts.frozen, best.adapters, best.masks)
    answers = (_examples(parts, start, {}), _examples(parts, best.adapters, best.masks))
    best = replace(best, adapters=parallel.local(best.adapters), masks=parallel.local(best.masks))
    frozen = parallel.local(parts.frozen)
    num_trainable = count(parts.adapted.adapters)

    def write() -> Results:
        results = measure(
            config=config,
            model=parts.model,
            splits=parts.splits,
            outcome=outcome,
            masks=best.masks,
            adapters=best.adapters,
            frozen=frozen,
            num_total=num_trainable + count(frozen),
            num_trainable=num_trainable,
            before=before,
            test=test,
            exported=(exported := _export(parts, frozen, best)),
            traces=traces,
            examples=answers,
            compile_seconds=seconds_compiling() - compiled_before,
            trained_together=trained_together,
        )
        plot_curves(read_metrics(directory / "metrics.jsonl"), directory / "curves.png", config.run_name)
        write_card(exported.parent / "README.md", config, parts.model, results)
        write_results(results, directory / "results.json")
        return results

    written = multihost.on_process_0(write)
    multihost.check_shared(directory / "results.json")
    return written or read_results(directory / "results.json")


def show(parts: RunSetup, results: Results) -> None:
    """Print the results, where the files are, and what to do next."""
    before_after_table(results.table())
    for text, was, now in results.example_rows():
        log(f"{text}\n    before: {was}\n    after:  {now}")
    shapes = ", ".join(results.compiled_shapes)
    log(f"compiled {len(results.compiled_shapes)} training programs, one for each shape of a batch: {shapes}")
    directory = directory_of(parts.config)
    log(
        f"\nfiles in {directory}: adapter, model card, curves.png, results.json, metrics.jsonl, config.yaml, checkpoints"
    )
    log("next:")
    log(f"  python -m jaxpeft predict {directory} {results.sentence()!r}")
    if parts.config.adapter.method != "prompt-tuning":  # it changes the input, which no merged weights do
        log(f"  python -m jaxpeft merge {directory} merged-model")


def _best(checkpoints: Checkpoints, outcome: Outcome) -> TrainState:
    update = outcome.progress.best_update
    if update is None or update == outcome.progress.update:
        return outcome.state
    return checkpoints.restore(outcome.state, update)[0]


def _examples(parts: RunSetup, adapters: Adapters, masks: Layers) -> list | None:
    if not has_examples(parts.config):
        return None
    texts = parts.config.evaluation.examples
    return fill_masks(parts.objective, parts.frozen, adapters, masks, parts.tokenizer, texts, top=3)


def _export(parts: RunSetup, frozen: Any, best: TrainState) -> Path:
    """Write what serves: the adapter in PEFT's files, or, where everything trained, the model. Returns the weights' file."""
    config, model, adapted, directory = parts.config, parts.model, parts.adapted, directory_of(parts.config)
    also: dict[str, Any] = {"tokenizer": parts.tokenizer, "label_names": parts.splits.label_names}
    is_random = config.model.weights == "random"
    if is_random:
        # Nobody else has this base: without it the adapter means nothing.
        save_model(directory / "base", model, merge(model.params, {**adapted.adapters, "sites": {}}), **also)
    if config.adapter.method == "full":
        return save_model(directory / "model", model, merge(frozen, best.adapters), **also)
    return save_adapter(
        directory / "adapter",
        best.adapters,
        with_length(adapted.method, parts.plan.num_steps),
        base=BaseInfo.of(model, str((directory / "base").absolute()) if is_random else None),
        frozen=frozen,
        start=adapted.adapters,
        masks=best.masks,
        target_modules=adapted.target_modules,
        exclude_modules=config.adapter.exclude_modules,
    )
