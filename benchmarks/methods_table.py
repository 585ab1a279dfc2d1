"""The README's table of all methods: python -m benchmarks.methods_table

Counts parameters in BERT-base (masked-LM, nothing computed), takes the relative step times that `benchmarks.step_cost` measured, and
writes the table between its marks in README.md. A test counts again and compares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import AutoConfig

from benchmarks.readme import write_part
from jaxpeft.adapters import METHODS, AdaLora, Ia3, Lora, S2ft, Site, SiteMethod, SuperTuning, Vera
from jaxpeft.models.build import build_abstract_model
from jaxpeft.report.methods import methods_table
from jaxpeft.trees import under

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- methods: python -m benchmarks.methods_table -->", "<!-- end of methods -->"


def bert_base_parameters() -> dict[str, int]:
    """Method → parameters that it trains in BERT-base: on query and value, at rank 8, if the method lets one choose these."""
    abstract = build_abstract_model(AutoConfig.for_model("bert"), "masked-lm")
    shapes = {path: leaf.shape for path, leaf in abstract.shapes.items()}
    layers = [
        path.removesuffix("/kernel")
        for path in abstract.base_kernels
        if path.endswith(("query/kernel", "value/kernel"))
    ]
    sites = [Site(layer, *shapes[f"{layer}/kernel"]) for layer in layers]
    second = [path.removesuffix("/kernel") for path in abstract.base_kernels if _is_second_feedforward(path)]
    channels = [Site(layer, *shapes[f"{layer}/kernel"]) for layer in second]
    words = Site("bert/embeddings/word_embeddings", *shapes["bert/embeddings/word_embeddings/embedding"], "embedding")
    counts = {}
    for name, kind in METHODS.items():
        # VeRA (rank 256) and AdaLoRA (rank 12) keep PEFT's defaults: rank 8 would make another method of them. A rank makes Supra
        # of Super-Tuning.
        method = (
            kind()
            if kind in (Vera, AdaLora, Ia3, SuperTuning) or "rank" not in kind.__dataclass_fields__
            else kind(rank=8)
        )
        if isinstance(method, SiteMethod):
            adapted = [words] if method.word_embeddings_only else channels if isinstance(method, S2ft) else sites
            counts[name] = sum(math.prod(shape) for site in adapted for shape in method.shapes(site).values())
        else:
            whole = {leaf for leaf in method.fully_trained(shapes, []) if under(leaf, [abstract.base_prefix])}
            counts[name] = sum(math.prod(shapes[leaf]) for leaf in whole)
    dora = sum(math.prod(shape) for site in sites for shape in Lora(rank=8, use_dora=True).shapes(site).values())
    everything = sum(map(math.prod, shapes.values()))
    head = sum(math.prod(shape) for path, shape in shapes.items() if not under(path, [abstract.base_prefix]))
    return {
        **counts,
        "sparse-lora": counts["lora"],
        "contextual": counts["lora"],
        "qlora": counts["lora"],
        "dora": dora,
        "full": everything,
        "head": head,
    }


def _is_second_feedforward(path: str) -> bool:
    return path.endswith("output/dense/kernel") and not path.endswith("attention/output/dense/kernel")


def table() -> str:
    """The README's table, in Markdown."""
    step_times = json.loads((ROOT / "benchmarks" / "step_cost.json").read_text())["relative"]
    return methods_table(bert_base_parameters(), step_times)


def main() -> None:
    """Write the table into the README."""
    write_part(BEGIN, END, table())


if __name__ == "__main__":
    main()
