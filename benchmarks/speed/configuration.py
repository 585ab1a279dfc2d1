"""The jaxpeft run of a case and a method: a `RunConfig`, as a file and flags would make it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed.cases import (
    ALPHA,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    METHODS,
    RANK,
    WEIGHT_DECAY,
    Case,
    OurMethod,
    targets,
)
from jaxpeft.config import (
    AdapterConfig,
    ContextualConfig,
    DataConfig,
    ModelConfig,
    PruningConfig,
    RunConfig,
    TrainingConfig,
)

NUM_STEPS = 1_000_000
"""More steps than any measurement takes."""


def run_config(case: Case, method: str | OurMethod, workload: Path) -> RunConfig:
    """The run on the files that `benchmarks.speed.workload` wrote into `workload`. `method` is one of `METHODS`, or a name of one."""
    ours = METHODS[method] if isinstance(method, str) else method
    model = json.loads((workload / "model" / "config.json").read_text())
    layers = range(model["n_layers" if model["model_type"] == "distilbert" else "num_hidden_layers"])
    upper = layers[len(layers) // 2 :]
    adapter = {
        "rank": RANK,
        "alpha": ALPHA,
        "target_modules": targets(model["model_type"]),
        "modules_to_save": list(case.modules_to_save) or None,
        "layers_to_transform": list(upper) if ours.upper_half else None,
        **ours.adapter,
    }
    file = str(workload / "slice.tsv")
    if case.task == "classification":
        # The file is named twice, so that none of its rows is held out. Its validation figures are not used.
        texts = {"train_file": file, "validation_file": file, "column_names": ["sentence", "label"]}
    else:
        texts = {"name": "python-docs"}
    return RunConfig(
        task=case.task,
        model=ModelConfig(name=str(workload / "model"), dtype=case.dtype, attention=case.attention, **ours.model),
        data=DataConfig(max_length=case.length, packing=case.packing, **texts),
        adapter=AdapterConfig(**adapter),
        pruning=PruningConfig(**ours.pruning),
        contextual=ContextualConfig(
            **{name: [share * (layer in upper) for layer in layers] for name, share in ours.contextual.items()}
        ),
        training=TrainingConfig(
            num_steps=NUM_STEPS,
            batch_size=case.rows,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            warmup_steps=0,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            **ours.training,
        ),
    )
