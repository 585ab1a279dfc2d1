"""The measurements of a run, for `results.json`, for the printed table and for the model card."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxpeft.config import EvaluationConfig
from jaxpeft.data import Splits
from jaxpeft.models.build import Model
from jaxpeft.pruning.masks import sparsity_of
from jaxpeft.tasks import task_for
from jaxpeft.tasks.by_class import ByClass, ClassFigures
from jaxpeft.tasks.metrics import get_metric
from jaxpeft.training.loop import Outcome
from jaxpeft.trees import Adapters, Layers, Params, size_bytes

_SHOWN = 20


@dataclass(frozen=True)
class Results:
    """All measurements of a run. Sizes are in bytes and times in seconds.

    `before` and `test` are metrics on `test_split`. `trained_together` is the number of runs that shared the program:
    `seconds`, `seconds_per_step` and `peak_memory_bytes` cover all of them, `tokens_per_second` only this run.
    `micro_batch_tokens` is the number of tokens that a pass computed of the longest rows; None: a batch was one pass.
    `reads_pairs` is True if every row of the data has two texts.
    `best_metric` is the validation metric that selected the adapter. `classes` are the figures of every class on `test_split`
    (`tasks.by_class.ClassFigures`), and `confusion` its rows by their class and by the predicted one, for up to 100 classes.
    `calibration` are the task's thresholds that were chosen on the validation rows (`Task.calibration`).
    `loss_options` are those of the training loss (`Task.loss_options`), such as the weight of every class.
    `channel_overlap` says for each encoder layer that left channels out how good the choice was (`contextual.overlap`).
    """

    name: str
    task: str
    method: str
    base: str
    base_source: str
    torch_class: str
    num_labels: int | None
    label_names: list[str] | None
    reads_pairs: bool
    data: str
    data_notes: list[str]
    parameters_total: int
    parameters_trainable: int
    adapter_entries: int
    adapter_entries_kept: int
    sparsity: float
    export: str
    export_bytes: int
    frozen_bytes: int
    test_split: str
    before: dict[str, float]
    test: dict[str, float]
    best_metric: str
    best_step: int
    steps: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    peak_memory_of: str
    compiled_shapes: list[str]
    device: str
    versions: dict[str, str]
    seconds_per_step: float = 0.0
    compile_seconds: float = 0.0
    trained_together: int = 1
    micro_batch_tokens: int | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)
    channel_overlap: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    loss_options: dict[str, Any] = field(default_factory=dict)

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (name, before, after) for the terminal."""
        rows = [(f"{self.test_split} {name}", was, now) for name, was, now in self.metric_rows()]
        share = 100 * self.parameters_trainable / self.parameters_total
        rows += [
            ("parameters", "", f"{self.parameters_total:,}"),
            ("  trainable", "", f"{self.parameters_trainable:,} ({share:.2f} %)"),
        ]
        if self.sparsity:
            rows += [("  adapter entries kept", "", f"{self.adapter_entries_kept:,} of {self.adapter_entries:,}")]
        return [
            *rows,
            ("adapter size" if self.method != "full" else "model size", "", f"{self.export_bytes / 1e6:.2f} MB"),
        ]

    def metric_rows(self) -> list[tuple[str, str, str]]:
        """(name, before, after) of every metric as text. `before` is – if the initial model was not tested."""
        title = task_for(self.task, self.num_labels, self.label_names).metric_title
        return [
            (
                title(name, self.label_names),
                m.in_words(self.before[name]) if name in self.before else "–",
                m.in_words(value),
            )
            for name, value in self.test.items()
            for m in [get_metric(name)]
        ]

    def class_rows(self) -> list[tuple[str, ...]]:
        """The figures of every class as text, in the order of `tasks.by_class.HEADS`."""
        return [ClassFigures(**figures).cells() for figures in self.classes]

    def sentence(self) -> str:
        """A sentence to try the run on, with a [MASK] for masked-lm."""
        if self.examples:
            return self.examples[0]["text"]
        return task_for(self.task, self.num_labels).example

    def pair(self) -> str | None:
        """The second text to `sentence`, or None if the run reads single texts."""
        return task_for(self.task, self.num_labels).example_pair if self.reads_pairs else None

    def example_rows(self) -> Iterator[tuple[str, str, str]]:
        """(sentence, answers before, answers after) of every example, the answers as text with probabilities."""
        for example in self.examples:
            yield example["text"], _words(example["before"]), _words(example["after"])


def measure(
    *,
    name: str,
    task: str,
    method: str,
    best_metric: str,
    evaluation: EvaluationConfig,
    model: Model,
    splits: Splits,
    reads_pairs: bool,
    outcome: Outcome,
    masks: Layers,
    adapters: Adapters,
    frozen: Params,
    num_total: int,
    num_trainable: int,
    before: dict[str, float],
    test: dict[str, float],
    classes: ByClass | None,
    calibration: Mapping[str, float],
    loss_options: Mapping[str, Any],
    exported: Path,
    traces: Counter,
    examples: tuple[list | None, list | None],
    compile_seconds: float,
    trained_together: int,
    channel_overlap: Mapping[int, dict[str, float]],
) -> Results:
    """Collect the measurements of a finished run as `Results`.

    `exported` is the weights file whose size is reported. `traces` counts the compiled training programs by
    (batch, length). `examples` are the answers to the example sentences before and after training, or None.
    """
    memory, whose = _peak_memory()
    entries = sum(leaf.size for leaf in jax.tree.leaves(adapters["sites"]))
    kept = sum(int((leaf != 0).sum()) for leaf in jax.tree.leaves(adapters["sites"]))
    return Results(
        name=name,
        task=task,
        method=method,
        base=model.source.hub_id or model.source.name,
        base_source=model.source.description,
        torch_class=model.torch_class,
        num_labels=splits.num_labels,
        label_names=list(splits.label_names) if splits.label_names else None,
        reads_pairs=reads_pairs,
        data=splits.source,
        data_notes=[*splits.notes, *_limits(evaluation)],
        parameters_total=num_total,
        parameters_trainable=num_trainable,
        adapter_entries=entries,
        adapter_entries_kept=kept,
        sparsity=sparsity_of(masks),
        export=str(exported.parent),
        export_bytes=exported.stat().st_size,
        frozen_bytes=size_bytes(frozen),
        test_split="test" if splits.test else "validation",
        before=before,
        test=test,
        best_metric=best_metric,
        best_step=outcome.progress.best_step or outcome.progress.step,  # the last one without a validation
        steps=outcome.progress.step,
        seconds=outcome.progress.seconds,
        tokens_per_second=outcome.tokens_per_second,
        peak_memory_bytes=memory,
        peak_memory_of=whose,
        compiled_shapes=[f"{batch} x {length}" for batch, length in sorted(traces)],
        device=f"{describe_devices()} ({platform.machine()})",
        versions={name: version(name) for name in ("jaxpeft", "jax", "flax", "optax", "transformers")},
        seconds_per_step=outcome.seconds_per_step,
        compile_seconds=compile_seconds,
        trained_together=trained_together,
        micro_batch_tokens=outcome.progress.micro_batch_tokens,
        examples=_examples(evaluation.examples, examples),
        channel_overlap={str(layer): shares for layer, shares in channel_overlap.items()},
        classes=[asdict(figures) for figures in classes.classes] if classes else [],
        confusion=[list(row) for row in classes.confusion] if classes and classes.confusion else None,
        calibration=dict(calibration),
        loss_options=dict(loss_options),
    )


def _limits(evaluation: EvaluationConfig) -> list[str]:
    most = evaluation.max_test_batches
    return [f"tested on {most * evaluation.batch_size:,} rows at most"] if most else []


def describe_devices() -> str:
    """The devices of the run as text: `4 x TPU v5 lite`, or `16 x TPU v5 lite on 4 hosts`."""
    devices, hosts = jax.devices(), jax.process_count()
    return f"{len(devices)} x {devices[0].device_kind}" + (f" on {hosts} hosts" if hosts > 1 else "")


def loss_in_words(options: Mapping[str, Any]) -> str:
    """The options of a training loss (`Task.loss_options`) as text: `label smoothing 0.1, class weights ham 0.6, spam 3`."""
    parts = []
    for name, value in options.items():
        shown = (
            [f"{key} {weight:.4g}" for key, weight in value.items()] if isinstance(value, Mapping) else [f"{value:g}"]
        )
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        parts.append(f"{name.replace('_', ' ')} {', '.join(shown[:_SHOWN])}{more}")
    return ", ".join(parts)


def write_results(results: Results, path: Path) -> None:
    """Write `results` as JSON, which `read_results` reads back."""
    path.write_text(json.dumps(asdict(results), indent=2) + "\n")


def read_results(path: Path) -> Results:
    """Read the `results.json` at `path`."""
    return Results(**json.loads(path.read_text()))


def _examples(texts: Sequence[str], answers: tuple[list | None, list | None]) -> list[dict[str, Any]]:
    before, after = answers
    if not after:
        return []
    return [{"text": text, "before": before[i] if before else [], "after": after[i]} for i, text in enumerate(texts)]


def _words(masks: list) -> str:
    return " | ".join(", ".join(f"{token} {100 * p:.0f} %" for token, p in answers) for answers in masks)


def _peak_memory() -> tuple[int, str]:
    """Peak memory in bytes and whose it is: the device's if the backend reports it, else the process's."""
    stats = jax.local_devices()[0].memory_stats() or {}  # None on a CPU
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"], "device"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
