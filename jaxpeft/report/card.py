"""The model card of an adapter: Hugging Face's metadata block, and only measured numbers."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jaxpeft.config import ContextualConfig
from jaxpeft.config.adapter import redraws_entries
from jaxpeft.models.label_maps import LABELS_FILE
from jaxpeft.report.card_subject import CardSubject
from jaxpeft.report.card_usage import usage
from jaxpeft.report.methods import in_peft, options
from jaxpeft.report.results import Results, loss_in_words
from jaxpeft.targets import default_targets
from jaxpeft.tasks.by_class import HEADS
from jaxpeft.tasks.metrics import get_metric
from jaxpeft.tasks.text_pipeline import RowOptions


def write_card(run: CardSubject) -> None:
    """Write the model card of a finished run as `README.md`, in the directory of the exported files."""
    results = run.results
    sections = [
        f"# {results.name}",
        _description(run),
        "## Training configuration\n\n" + _table(_configuration(run)),
        "## Parameters\n\n" + _table(_parameters(results)),
        "## Results\n\n" + _results(results),
        *(["## Classes\n\n" + _classes(run)] if results.classes else []),
        *(
            [f"## Sparsity\n\n![Pruned entries, changes of the masks, and ranks left]({run.masks.name})"]
            if run.masks
            else []
        ),
        "## Usage\n\n" + usage(run),
        "## How it was measured\n\n" + _measured(run),
    ]
    if run.citations:
        sections.append("## Citations\n\n" + "\n".join(f"- {line}" for line in run.citations))
    ModelCard(f"---\n{_metadata(run).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(run.export / "README.md")


def _metadata(run: CardSubject) -> ModelCardData:
    config, task, model, results = run.config, run.task, run.model, run.results
    dataset = _dataset_id(config.data.name)
    evaluations = [
        EvalResult(
            task_type=task.pipeline_tag,
            dataset_type=dataset or "local",
            dataset_name=config.data.name or Path(config.data.train_file or "").name,
            dataset_split=results.test_split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in results.test.items()
    ]
    return ModelCardData(
        base_model=model.source.hub_id,
        library_name="transformers"
        if config.adapter.method == "full"
        else "peft"
        if in_peft(config.adapter)
        else "jaxpeft",
        pipeline_tag=task.pipeline_tag,
        tags=[
            "jax",
            "flax",
            "jaxpeft",
            run.title.lower().replace(" ", "-"),
        ],
        datasets=dataset,
        metrics=list(results.test),
        model_name=results.name,
        eval_results=evaluations,
    )


def _dataset_id(name: str | None) -> str | None:
    if name is None or name == "python-docs":
        return None
    if name.startswith("wikitext-"):
        return "Salesforce/wikitext"
    return "nyu-mll/glue" if name.startswith("glue/") else name


def _description(run: CardSubject) -> str:
    config, results = run.config, run.results
    base = run.model.source.hub_id or Path(results.base).name
    return (
        f"{run.title} of `{base}` for {run.task.title} on {run.without_paths(results.data)}, trained in JAX with jaxpeft. "
        + (
            "The files are a plain transformers model."
            if config.adapter.method == "full"
            else "The files are in PEFT's format."
            if in_peft(config.adapter)
            else f"PEFT does not have {'the option keep_base_zeros' if config.adapter.keep_base_zeros else 'this method'} and cannot load "
            "the files; `jaxpeft.load_adapter` can."
        )
    )


_SCOPES = {"tensor": "per tensor", "layer": "per layer", "global": "over all layers"}


def _configuration(run: CardSubject) -> list[tuple[str, str]]:
    config, method, model, results = run.config, run.method, run.model, run.results
    a, t, p, m = config.adapter, config.training, config.pruning, config.model
    rows = [("method", run.title)]
    if method:
        rows += options(method)
        if targets := a.target_modules or default_targets(method.name, model.model_type):
            rows.append(("target modules", targets if isinstance(targets, str) else ", ".join(targets)))
    if p.sparsity:
        pieces = "" if p.structure == "element" else f", in pieces {p.structure}"
        rows.append(
            ("sparsity", f"{100 * p.sparsity:g} %, {p.criterion}-based, {_SCOPES[p.scope]}{pieces}, {p.schedule}")
        )
    if redraws_entries(a, p):
        rows.append(
            ("entries redrawn", f"{p.schedule}, every {p.every_steps} steps, {100 * p.drop_fraction:g} % at first")
        )
    return [
        *rows,
        ("frozen base stored as", f"linear layers in {model.quantization}" if model.quantization else m.dtype),
        ("dropout in the base", "as in the checkpoint" if m.dropout is None else f"{m.dropout:g}"),
        ("steps", f"{results.steps}"),
        ("batch size", f"{t.batch_size} × {t.accumulation_steps}" if t.accumulation_steps > 1 else f"{t.batch_size}"),
        ("tokens per row", f"{config.data.max_length}"),
        *([("training loss", loss_in_words(results.loss_options))] if results.loss_options else []),
        ("optimizer", f"AdamW, weight decay {t.weight_decay:g}, gradients clipped to norm {t.max_grad_norm:g}"),
        ("learning rate", f"{t.learning_rate:g}, {t.schedule}, {run.warmup_steps} warm-up steps"),
        ("seed", f"{config.seed}"),
    ]


def _parameters(results: Results) -> list[tuple[str, str]]:
    share = 100 * results.parameters_trainable / results.parameters_total
    rows = [
        ("total", f"{results.parameters_total:,}"),
        ("trainable", f"{results.parameters_trainable:,} ({share:.2f} %)"),
        (
            "model size on disk" if results.method == "full" else "adapter size on disk",
            f"{results.export_bytes / 1e6:.2f} MB",
        ),
        ("frozen base in memory", f"{results.frozen_bytes / 1e6:.1f} MB"),
    ]
    if results.adapter_entries:
        rows.insert(2, ("adapter entries not zero", f"{results.adapter_entries_kept:,} of {results.adapter_entries:,}"))
    return rows


def _results(results: Results) -> str:
    lines = [
        f"| {results.test_split} | before | after |",
        "|---|---:|---:|",
        *(f"| {name} | {was} | {now} |" for name, was, now in results.metric_rows()),
    ]
    by = get_metric(results.best_metric).title
    text = "\n".join(lines) + (
        f"\n\nThe adapter after step {results.best_step} of {results.steps}, the best on validation by {by}."
    )
    if results.examples:
        examples = [f"- {text}\n  - before: {was}\n  - after: {now}" for text, was, now in results.example_rows()]
        text += "\n\nMasks filled in:\n\n" + "\n".join(examples)
    return text


_MOST_CLASSES = 100


def _classes(run: CardSubject) -> str:
    """The figures of every class, up to a number that can be read."""
    results, rows = run.results, run.results.class_rows()
    names_in = "config.json" if results.method == "full" else LABELS_FILE
    lines = [
        f"On the {results.test_split} rows. `{names_in}` has the names in the order of the ids."
        if results.label_names
        else f"On the {results.test_split} rows. The classes have no names, only ids.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---|" + "---:|" * (len(HEADS) - 1),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows[:_MOST_CLASSES]),
    ]
    if len(rows) > _MOST_CLASSES:
        lines += ["", f"The other {len(rows) - _MOST_CLASSES} classes are in the run's `results.json`."]
    if run.confusion:
        lines += ["", f"![Rows of each class by their predicted class]({run.confusion.name})"]
    return "\n".join(lines)


def _measured(run: CardSubject) -> str:
    config, results = run.config, run.results
    peak = f"{results.peak_memory_bytes / 1e6:,.0f} MB peak memory of the {results.peak_memory_of}"
    others = results.trained_together - 1
    company = f" (in one program with {others} other runs, which share this time and memory)" if others else ""
    lines = [
        f"{results.steps} steps in {results.seconds:.0f} s on {results.device}{company}: "
        f"{results.tokens_per_second:,.0f} tokens per second, {peak}, "
        f"{len(results.compiled_shapes)} compiled training programs ({', '.join(results.compiled_shapes)}).",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in results.versions.items()) + ".",
    ]
    if config.pruning.sparsity:
        lines.append("Element sparsity of an adapter makes neither training nor inference faster.")
    if results.calibration:
        chosen = ", ".join(f"{name} {value:.4g}" for name, value in results.calibration.items())
        same = ", which are the rows of the figures above" if results.test_split == "validation" else ""
        lines.append(f"Chosen on the validation rows{same}: {chosen}. Figures before training are at the default.")
    if results.channel_overlap:
        lines.append(_chosen_channels(config.contextual, results))
    rows = RowOptions.of(config.data)
    return "\n\n".join(
        [*run.task.notes(rows), *lines, *(f"Data: {run.without_paths(note)}." for note in results.data_notes)]
    )


def _chosen_channels(x: ContextualConfig, results: Results) -> str:
    """How much each layer left out, and how good the choice was."""
    overlap, groups = results.channel_overlap, ("query_key", "value", "feed_forward")
    rows = [
        f"| {number} | " + " | ".join(f"{100 * overlap[number][group]:.0f} %" for group in groups) + " |"
        for number in overlap
    ]
    return "\n".join(
        [
            f"Training left channels of the base out: feed-forward {x.ffn_sparsity}, attention {x.qkv_sparsity}; the first "
            f"{100 * x.dense_share:g} % of the steps and all evaluations were dense. The estimates found this share of the truly "
            "largest half of the channels (50 % would be chance), on a training batch:",
            "",
            "| layer | queries and keys | values | feed-forward |",
            "|---:|---:|---:|---:|",
            *rows,
        ]
    )


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
