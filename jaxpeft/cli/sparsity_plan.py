"""`jaxpeft sparsity-plan`: how much each layer of a model may leave out in training (SparseLoRA)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxpeft.cli.process import guarded
from jaxpeft.config.parsing import Parser
from jaxpeft.errors import InputError


def main(argv: Sequence[str], *, prog: str) -> None:
    """Parse the arguments, sweep, print the table and write the proposal."""
    parser = Parser(
        prog=prog,
        description="Measure how much the outputs of a model change if one layer leaves channels out, and propose sparsities for "
        "--contextual.*. No labels are needed, and nothing is trained.",
    )
    parser.add_argument("model", help="Hub id, directory or package:module/folder, as in --model.name.")
    parser.add_argument("data", help="Name or file of texts, as in --data.name or --data.train_file.")
    parser.add_argument(
        "--operations",
        type=float,
        default=0.5,
        help="Share of the multiplications in the encoder's linear layers that the proposal keeps.",
    )
    parser.add_argument("--batches", type=int, default=2, help="Batches of texts to measure on.")
    parser.add_argument("--batch_size", type=int, default=8, help="Rows per batch.")
    parser.add_argument("--max_length", type=int, default=128, help="Tokens per row.")
    parser.add_argument("--estimator_rank", type=int, default=8, help="Rank of the estimates that choose channels.")
    parser.add_argument(
        "--output", default="sparsity.yaml", help="File for the proposal; train.py reads it with --config."
    )
    values = parser.parse_args(list(argv))
    guarded(lambda: sparsity_plan(**values.as_dict()), prog)


def sparsity_plan(
    model: str,
    data: str,
    operations: float,
    batches: int,
    batch_size: int,
    max_length: int,
    estimator_rank: int,
    output: str,
) -> None:
    """Sweep over the layers of `model` on texts of `data`, and write a proposal to the YAML file `output`."""
    for name, value in {"batches": batches, "batch_size": batch_size, "estimator_rank": estimator_rank}.items():
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
    if not 0 < operations <= 1:
        raise InputError(f"--operations is {operations:g}; it must be above 0 and at most 1")
    if Path(output).exists():
        raise InputError(f"'{output}' exists already; remove it, or give another --output")
    import yaml

    from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig
    from jaxpeft.contextual.estimators import make_estimators
    from jaxpeft.contextual.overlap import channel_overlap, mean_overlap
    from jaxpeft.contextual.sensitivity import check_reachable, measure_sensitivity, propose
    from jaxpeft.report.console import log
    from jaxpeft.runs.base_model import load_base
    from jaxpeft.runs.compilation_cache import enable_compilation_cache
    from jaxpeft.runs.data import load_data, text_pipeline

    check_reachable(operations)  # before the sweep, which takes minutes
    enable_compilation_cache()
    is_file = Path(data).suffix in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
    texts = DataConfig(name=None if is_file else data, train_file=data if is_file else None, max_length=max_length)
    task, splits = load_data(texts, "masked-lm")
    loaded, tokenizer = load_base(ModelConfig(name=model), task, None, AdapterConfig(), max_length=max_length, seed=0)
    rows = task.make_data(splits.train, text_pipeline(texts, loaded, tokenizer), batch_size=batch_size, seed=0)
    seen = [rows.train_batch(i) for i in range(batches)]
    number = loaded.config.num_hidden_layers
    estimators = make_estimators(loaded, range(number), rank=estimator_rank)
    found = measure_sensitivity(loaded, loaded.params, estimators, seen)
    overlap = channel_overlap(loaded, loaded.params, estimators, seen[0], layers=range(number))
    plan = propose(found, loaded, operations=operations)

    log(
        "change of the outputs if one layer leaves channels out, and the share of the largest half that the estimates find"
    )
    levels = "".join(f"{level:>8g}" for level in found.levels)
    log(f"layer  attention{levels}  found   feed-forward{levels}  found")
    for layer in range(number):
        shares = overlap[layer]
        attention = "".join(f"{error:8.3f}" for error in found.errors["attention"][layer])
        ffn = "".join(f"{error:8.3f}" for error in found.errors["feed_forward"][layer])
        attended = (shares["query_key"] + shares["value"]) / 2
        log(
            f"{layer:5}  {'':9}{attention}  {100 * attended:3.0f} %   {'':12}{ffn}  {100 * shares['feed_forward']:3.0f} %"
        )
    log(f"found on average: {100 * mean_overlap(overlap):.0f} %; chance finds 50 %")
    proposal = {"contextual": {"ffn_sparsity": list(plan.feed_forward), "qkv_sparsity": list(plan.attention)}}
    text = yaml.safe_dump(proposal, sort_keys=False, default_flow_style=None)
    Path(output).write_text(text)
    log(f"\n{text}\nwritten to {output}; train with it: python train.py --config YOUR.yaml --config {output}")
