"""The study of sparse methods: what it calls equal is equal."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs

from jaxpeft.comparison.grid import Cell, CompareConfig, run_of
from jaxpeft.config.parsing import parse_file_into
from jaxpeft.preflight.abstract_run import abstract_run
from jaxpeft.training.sharding import data_parallel
from jaxpeft.trees import count

STUDY = Path(__file__).parents[2] / "benchmarks/sparsity/study.yaml"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kept"), [("shira", 1), ("super-tuning", 1), ("s2ft", 1), ("half-of-rank-16", 0.5), ("dense-rank-4", 2)]
)
def test_as_many_parameters_train_as_lora_has(method, kept):
    """On MiniLM's shapes: r·(384 + 384) entries in twelve layers. Half of rank 8 is a dense rank 4."""
    config = parse_file_into(CompareConfig, ["--config", str(STUDY)], "compare", description="")()
    run = run_of(config, Cell("wikitext-2", method, 1e-3, 0))
    run = replace(run, model=replace(run.model, name=str(tiny_runs.package_model())))
    sites = abstract_run(run, data_parallel()).state.adapters["sites"]
    assert kept * count(sites) == pytest.approx(8 * (384 + 384) * 12, rel=1e-4)
