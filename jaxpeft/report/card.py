"""The model card of an adapter: Hugging Face's metadata block, and only measured numbers."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jaxpeft.config import RunConfig
from jaxpeft.models.build import Model
from jaxpeft.report.methods import DATA_TYPES, citations, method_name, options
from jaxpeft.report.results import Results
from jaxpeft.runs.prepare import build_method
from jaxpeft.targets import default_targets

_BERT = "BERT: Devlin et al. 2018, arXiv 1810.04805"


def write_card(path: Path, config: RunConfig, model: Model, results: Results) -> None:
    """Write the model card of a finished run to `path`, which is in the directory of the exported files."""
    sections = [
        f"# {results.name}",
        _description(config, results),
        "## Training configuration\n\n" + _table(_configuration(config, model, results)),
        "## Parameters\n\n" + _table(_parameters(results)),
        "## Results\n\n" + _results(results),
        "## Usage\n\n" + _usage(path.parent, config, model, results),
        "## How it was measured\n\n" + _measured(config, results),
        "## Citations\n\n" + "\n".join(f"- {line}" for line in citations(config) or [_BERT]),
    ]
    ModelCard(f"---\n{_metadata(config, model, results).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n").save(path)


def _metadata(config: RunConfig, model: Model, results: Results) -> ModelCardData:
    dataset = _dataset_id(config)
    evaluations = [
        EvalResult(
            task_type="fill-mask" if config.task == "masked-lm" else "text-classification",
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
        library_name="peft" if config.adapter.method != "full" else "transformers",
        pipeline_tag="fill-mask" if config.task == "masked-lm" else "text-classification",
        tags=["jax", "flax", "jaxpeft", method_name(config).lower().replace(" ", "-")],
        datasets=dataset,
        metrics=list(results.test),
        model_name=results.name,
        eval_results=evaluations,
    )


def _dataset_id(config: RunConfig) -> str | None:
    name = config.data.name
    if name is None or name == "python-docs":
        return None
    if name.startswith("wikitext-"):
        return "Salesforce/wikitext"
    return "nyu-mll/glue" if name.startswith("glue/") else name


def _description(config: RunConfig, results: Results) -> str:
    what = "masked language modelling" if config.task == "masked-lm" else "classification"
    return f"{method_name(config)} of `{results.base}` for {what} on {results.data}, trained in JAX with jaxpeft. " + (
        "The files are a plain transformers model."
        if config.adapter.method == "full"
        else "The files are in PEFT's format."
    )


def _configuration(config: RunConfig, model: Model, results: Results) -> list[tuple[str, str]]:
    a, t, p, m = config.adapter, config.training, config.pruning, config.model
    rows = [("method", method_name(config))]
    if method := build_method(config):
        rows += options(method)
        if targets := a.target_modules or default_targets(method.name, model.model_type):
            rows.append(("target modules", targets if isinstance(targets, str) else ", ".join(targets)))
    if p.sparsity:
        rows.append(("sparsity", f"{100 * p.sparsity:g} %, magnitude-based, per tensor, {p.schedule}"))
    return [
        *rows,
        ("frozen base stored as", f"linear layers in {model.quantization}" if model.quantization else m.dtype),
        ("dropout in the base", "as in the checkpoint" if m.dropout is None else f"{m.dropout:g}"),
        ("steps", f"{results.steps}"),
        ("batch size", f"{t.batch_size} × {t.accumulation_steps}" if t.accumulation_steps > 1 else f"{t.batch_size}"),
        ("tokens per row", f"{config.data.max_length}"),
        ("optimizer", f"AdamW, weight decay {t.weight_decay:g}, gradients clipped to norm {t.max_grad_norm:g}"),
        ("learning rate", f"{t.learning_rate:g}, {t.schedule}, {t.warmup_steps} warm-up steps"),
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
    text = (
        "\n".join(lines) + f"\n\nThe adapter after step {results.best_step} of {results.steps}, the best on validation."
    )
    if results.examples:
        examples = [f"- {text}\n  - before: {was}\n  - after: {now}" for text, was, now in results.example_rows()]
        text += "\n\nMasks filled in:\n\n" + "\n".join(examples)
    return text


def _usage(export: Path, config: RunConfig, model: Model, results: Results) -> str:
    run = export.parent
    sentence = results.sentence()
    note = ""
    if config.model.quantization != "none":
        data_type = DATA_TYPES[config.model.quantization]
        note = (
            f"\nIt was trained on an {data_type} base. On the full-precision base below its outputs differ slightly.\n"
        )
    here = f"""In JAX:

```python
import jaxpeft

run = jaxpeft.load_run({str(run)!r})
print(run.predict([{sentence!r}]))
```
"""
    if config.adapter.method == "prompt-tuning" and config.task == "masked-lm":
        return (
            f"{here}\ntorch PEFT (0.21) has no prompt tuning for masked language models, so it cannot load these files."
        )
    if config.adapter.init_lora_weights == "loftq":
        note += "\ntorch PEFT (0.21) runs LoftQ at every load, which needs an accelerator.\n"
    return f"""{here}{note}
In torch, with {"transformers" if config.adapter.method == "full" else "PEFT"}:

```python
{_torch_lines(export, config, model, results, sentence)}
```"""


def _torch_lines(export: Path, config: RunConfig, model: Model, results: Results, sentence: str) -> str:
    auto = "AutoModelForMaskedLM" if config.task == "masked-lm" else "AutoModelForSequenceClassification"
    labels = f", num_labels={results.num_labels}" if config.task == "classification" else ""
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    if config.adapter.method == "full":
        lines += [f"base = {str(export)!r}", f"model = {auto}.from_pretrained(base)"]
    else:
        lines = ["from peft import PeftModel", *lines, *_base_lines(export, config, model)]
        lines += [
            f"model = {auto}.from_pretrained(base{labels})",
            f"model = PeftModel.from_pretrained(model, {str(export)!r})",
        ]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(base)", "model.eval()"]
    if config.task == "masked-lm":
        lines += [
            f'text = {sentence!r}.replace("[MASK]", tokenizer.mask_token)',  # not every tokenizer's is [MASK]
            'inputs = tokenizer(text, return_tensors="pt")',
            "mask = (inputs.input_ids == tokenizer.mask_token_id).nonzero()[0, 1]",
            "print(tokenizer.decode(model(**inputs).logits[0, mask].argmax()))",
        ]
    else:
        answer = "logits" if results.num_labels == 1 else "logits.softmax(-1)"
        lines += [f'inputs = tokenizer({sentence!r}, return_tensors="pt")', f"print(model(**inputs).{answer})"]
    return "\n".join(lines)


def _base_lines(export: Path, config: RunConfig, model: Model) -> list[str]:
    packaged = model.source.packaged_as
    if config.model.weights == "random":  # only this run has the base, which was saved beside the adapter
        return [f"base = {str(export.parent / 'base')!r}"]
    if packaged:
        package, _, folder = packaged.removeprefix("package:").partition("/")
        hub = f"  # the hub's {model.source.hub_id}" if model.source.hub_id else ""
        find = f'find_spec("{package}").submodule_search_locations[0]'
        return ["from importlib.util import find_spec", "", f'base = {find} + "/{folder}"{hub}']
    return [f"base = {(model.source.hub_id or os.path.abspath(model.source.directory))!r}"]


def _measured(config: RunConfig, results: Results) -> str:
    peak = f"{results.peak_memory_bytes / 1e6:,.0f} MB peak memory of the {results.peak_memory_of}"
    others = results.trained_together - 1
    company = f" (in one program with {others} other runs, which share this time and memory)" if others else ""
    lines = [
        f"{results.steps} steps in {results.seconds:.0f} s on {results.device}{company}: "
        f"{results.tokens_per_second:,.0f} tokens per second, {peak}, "
        f"{len(results.compiled_shapes)} compiled training programs ({', '.join(results.compiled_shapes)}).",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in results.versions.items()) + ".",
    ]
    if config.task == "masked-lm":
        ratio = f"{100 * config.data.mask_ratio:g} %"
        lines.insert(
            0,
            f"Perplexity is exp of the mean loss over exactly {ratio} of the real tokens of every row, with fixed evaluation masks.",
        )
    if config.pruning.sparsity:
        lines.append("Element sparsity of an adapter makes neither training nor inference faster.")
    return "\n\n".join([*lines, *(f"Data: {note}." for note in results.data_notes)])


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
