"""BERT-base and DistilBERT with LoRA compiled for TPUs from 1 chip to 256. Needs libtpu (docs/tpu.md), but no TPU.

    python -m benchmarks.preflight                        # writes benchmarks/preflight.json and preflight.md, case by case
    python -m benchmarks.preflight --only v6e             # those cases again; the others' figures stay

Masked-lm in bf16, 32 rows of 128 tokens a chip, rank 8 on query and value. A case takes one to two minutes on a quiet core, the
one that searches for the largest batch several times that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from jaxpeft.preflight.chips import GIBIBYTE, parse_topology
from jaxpeft.preflight.command import compile_in_child

FILE = Path(__file__).with_name("preflight.json")
ROWS_A_CHIP = 32
LARGEST = ("distilbert", "v5e:1x1")
CASES = (
    *(("distilbert", topology) for topology in ("v6e:1x1", "v5e:16x16", "v5p:4x8x8", "v5e:1x1")),
    *(("bert-base", topology) for topology in ("v6e:16x16", "v5p:2x2x1", "v5e:2x4", "v5p:4x8x8", "v5e:16x16")),
    *(("distilbert", topology) for topology in ("v5e:2x4", "v5p:1x1x1", "v6e:16x16")),
)


def main() -> None:
    """Compile the cases, and write each result as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose name contains this, such as bert-base or v6e")
    only = parser.parse_args().only
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    for model, topology in CASES:
        name = f"{model} {topology}"
        if only in name:
            print(name, flush=True)
            results[name] = measure(model, topology)
            ordered = {f"{m} {t}": results[f"{m} {t}"] for m, t in CASES if f"{m} {t}" in results}
            FILE.write_text(json.dumps(ordered, indent=1) + "\n")
            FILE.with_suffix(".md").write_text(table(ordered))
    print(table(results))


def measure(model: str, topology: str) -> dict[str, Any]:
    """The report of one case, as plain values."""
    with tempfile.TemporaryDirectory() as directory:
        write_config(model, Path(directory))
        config = RunConfig(
            model=ModelConfig(name=f"{directory}/config.json", weights="random", dtype="bfloat16"),
            data=DataConfig(name="wikitext-2-raw-v1"),  # not read: a masked-lm batch's shape is the configuration's
            adapter=AdapterConfig(rank=8),
            training=TrainingConfig(batch_size=ROWS_A_CHIP * parse_topology(topology).num_chips),
        )
        largest = (model, topology) == LARGEST
        return asdict(compile_in_child(_splittable(config), topology, largest_batch=largest, kinds=("training",)))


def _splittable(config: RunConfig) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, batch_size=config.training.batch_size))


def write_config(model: str, directory: Path) -> None:
    """The architecture's config.json, as transformers makes it by default."""
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.distilbert.configuration_distilbert import DistilBertConfig

    {"bert-base": BertConfig, "distilbert": DistilBertConfig}[model]().save_pretrained(directory)


def table(results: dict[str, Any]) -> str:
    """The Markdown table of the results."""
    head = (
        *("case", "compiled in", "memory a chip", "FLOPs a chip and step", "between chips", "scalars", "matrix units"),
        *("HBM", "interconnect", "limited by", "largest batch"),
    )
    rows = [head, ["---", *["---:"] * 8, "---", "---:"], *(_row(name, each) for name, each in results.items())]
    versions = sorted({f"jax {each['jax_version']}, libtpu {each['libtpu_version']}" for each in results.values()})
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([f"`python -m benchmarks.preflight`: {'; '.join(versions)}.", "", *lines]) + "\n"


def _row(name: str, report: dict[str, Any]) -> list[str]:
    compiled, chip = report["programs"][0]["compiled"], parse_topology(report["topology"]).chip
    outcome, largest = compiled["outcome"], report["largest_batch"]
    if "memory" not in outcome:
        return [name, f"{compiled['seconds']:.0f} s", "does not fit", *["–"] * 8]
    memory, sent, seconds = sum(outcome["memory"].values()), outcome["traffic"], outcome["roofline"]
    times = {
        "matrix units": seconds["compute_seconds"],
        "HBM": seconds["memory_seconds"],
        "interconnect": seconds["interconnect_seconds"],
    }
    return [
        name,
        f"{compiled['seconds']:.0f} s",
        f"{memory / GIBIBYTE:.2f} of {chip.program_hbm_bytes / GIBIBYTE:.2f} GiB",
        f"{outcome['flops'] / 1e9:,.0f} G",
        f"{sent['array_bytes']:,} of {report['gradient_bytes']:,} bytes",
        f"{sent['scalar_bytes']} bytes",
        *(f"{time * 1e3:.3f} ms" for time in times.values()),
        max(times, key=times.__getitem__),
        f"{largest['rows']:,} rows" if largest else "–",
    ]


if __name__ == "__main__":
    main()
