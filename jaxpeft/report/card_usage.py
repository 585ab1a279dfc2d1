"""The code of a model card: how to use the files in JAX and in torch."""

from __future__ import annotations

from jaxpeft.quantization import NUMBER_FORMATS
from jaxpeft.report.card_subject import CardSubject
from jaxpeft.report.methods import in_peft

PLACE = "path/to"
"""Stands for the directory of a local run or model, because the reader of a card has another one than its writer."""


def usage(run: CardSubject) -> str:
    """The card's section on usage."""
    config, results = run.config, run.results
    sentence, pair = results.sentence(), results.pair()
    texts = f"[{sentence!r}]" if pair is None else f"[{sentence!r}], [{pair!r}]"
    note = ""
    if config.model.quantization != "none":
        data_type = NUMBER_FORMATS[config.model.quantization].title
        note = (
            f"\nIt was trained on an {data_type} base. On the full-precision base below its outputs differ slightly.\n"
        )
    here = f"""In JAX:

```python
import jaxpeft

run = jaxpeft.load_run({f"{PLACE}/{run.export.parent.name}"!r})
print(run.predict({texts}))
```
"""
    if not in_peft(config.adapter):
        return here
    if config.adapter.method == "prompt-tuning" and run.task.fills_masks:
        return (
            f"{here}\ntorch PEFT (0.21) has no prompt tuning for masked language models, so it cannot load these files."
        )
    if config.adapter.method == "prompt-tuning" and _loses_token_types(run):
        return f"{here}\ntorch PEFT (0.21) leaves `token_type_ids` out of {run.task.title}, so with these files its outputs are others."
    if config.adapter.init_lora_weights == "loftq":
        note += "\ntorch PEFT (0.21) runs LoftQ at every load, which needs an accelerator.\n"
    return f"""{here}{note}
In torch, with {"transformers" if config.adapter.method == "full" else "PEFT"}:

```python
{_torch_lines(run, sentence, pair)}
```""" + _in_library(run, sentence)


def _in_library(run: CardSubject, sentence: str) -> str:
    """The code for a library of the task's own, if there is one."""
    found = run.task.in_library(_export_place(run), sentence)
    if found is None:
        return ""
    library, lines = found
    if run.config.adapter.method == "prompt-tuning":
        return f"\n\n{library} cannot load a prompt: transformers reads only adapters that are put into layers."
    code = "\n".join(lines)
    return f"\n\nIn {library}:\n\n```python\n{code}\n```"


def _export_place(run: CardSubject) -> str:
    return f"{PLACE}/{run.export.parent.name}/{run.export.name}"


def _torch_lines(run: CardSubject, sentence: str, pair: str | None) -> str:
    auto, export = run.task.auto_class, _export_place(run)
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    if run.config.adapter.method == "full":
        lines += [f"base = {export!r}", f"model = {auto}.from_pretrained(base)"]
    else:
        lines = ["from peft import PeftModel", *lines, *_base_lines(run), *_model_lines(run)]
        lines += [f"model = PeftModel.from_pretrained(model, {export!r})"]
        if _loses_token_types(run):
            lines += ["model = model.get_base_model()  # has the adapter; PEFT's own class leaves token_type_ids out"]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(base)", "model.eval()", *run.task.torch_lines(sentence, pair)]
    return "\n".join(lines)


def _loses_token_types(run: CardSubject) -> bool:
    """True if the base distinguishes the two texts of a row, and PEFT's class for the task does not tell it which is which."""
    return run.model.head.peft_drops_token_types and getattr(run.model.config, "type_vocab_size", 0) > 1


def _model_lines(run: CardSubject) -> list[str]:
    results, arguments, lines = run.results, ["base"], []
    if run.task.reads_labels and results.label_names:
        lines = [f"labels = {dict(enumerate(results.label_names))!r}"]
        arguments += ["id2label=labels", "label2id={name: i for i, name in labels.items()}"]
    elif run.task.reads_labels:
        arguments += [f"num_labels={results.num_labels}"]
    if run.task.problem_type == "multi_label_classification":  # transformers does not see it by the number of classes
        arguments += [f'problem_type="{run.task.problem_type}"']
    if run.model.other_classes:  # the adapter's file has the new head
        arguments += ["ignore_mismatched_sizes=True"]
    return [*lines, f"model = {run.task.auto_class}.from_pretrained({', '.join(arguments)})"]


def _base_lines(run: CardSubject) -> list[str]:
    model = run.model
    packaged = model.source.packaged_as
    if run.drawn_base:
        return [f"base = {f'{PLACE}/{run.export.parent.name}/{run.drawn_base.name}'!r}"]
    if packaged:
        package, _, folder = packaged.removeprefix("package:").partition("/")
        hub = f"  # the hub's {model.source.hub_id}" if model.source.hub_id else ""
        find = f'find_spec("{package}").submodule_search_locations[0]'
        return ["from importlib.util import find_spec", "", f'base = {find} + "/{folder}"{hub}']
    return [f"base = {model.source.hub_id or f'{PLACE}/{model.source.directory.absolute().name}'!r}"]
