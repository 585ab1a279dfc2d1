"""Adapters that were really trained: a few steps of the library's own, on a tiny base."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import torch_side

from jaxpeft import BaseInfo, apply, load_model, save_adapter
from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, PruningConfig, RunConfig
from jaxpeft.pruning.masks import keep_counts
from jaxpeft.runs.adapters import Adapted, fully_trained
from jaxpeft.tasks import task_for
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.step import init_state, make_train_step, prune_step


@dataclass(frozen=True)
class Case:
    """What is trained: `head` says whether the masked-lm head is in the checkpoint ("old") or not ("new")."""

    model_type: str
    method: str
    task: str = "masked-lm"
    head: str = "new"
    num_labels: int = 2
    layers: int = 1

    def __str__(self):
        what = f"{self.num_labels}-labels" if self.task == "classification" else f"{self.head}-head"
        return f"{self.model_type}-{self.method}-{what}"


@dataclass(frozen=True)
class Trained:
    """A case after its training; `base` is what it was loaded from, `directory` holds the exported adapter."""

    case: Case
    base: Path
    model: Any
    adapted: Adapted
    adapters: dict
    masks: dict
    directory: Path
    inputs: dict = field(repr=False)

    def logits(self, **changed):
        values = {"frozen": self.adapted.frozen, "adapters": self.adapters, "masks": self.masks, **changed}
        return our_logits(self.model, method=self.adapted.method, inputs=self.inputs, **values)


def our_logits(model, *, frozen, adapters, method, inputs, masks=None):
    return np.asarray(apply(model.module, frozen, adapters, method, masks=masks, **model.inputs(inputs)).logits)


def run_config(case, base):
    return RunConfig(
        task=case.task,
        model=ModelConfig(name=str(base)),
        data=DataConfig(train_file="none.txt"),
        adapter=AdapterConfig(
            method="lora" if case.method == "sparse" else case.method, rank=4, alpha=12.0, dropout=0.1
        ),
        pruning=PruningConfig(sparsity=0.5 if case.method == "sparse" else 0.0),
    )


def train(case, base, directory):
    """Three updates with dropout; a sparse adapter is pruned after the second."""
    config = run_config(case, base)
    classify = case.task == "classification"
    model = load_model(
        str(base),
        case.task,
        num_labels=case.num_labels if classify else None,
        trained_leaves=lambda leaves, prefix: fully_trained(config.adapter, task_for(case.task, 2), leaves, prefix),
    )
    adapted = tiny.prepared(config, model)
    objective = Objective(model, adapted.method, tiny.task_of(model))
    optimizer = build_optimizer(lambda _: jnp.float32(0.05), weight_decay=0.01, max_grad_norm=1.0)
    sparse = case.method == "sparse"
    # A copy: the step is donated its state, and `adapted` is still wanted.
    state = jax.tree.map(jnp.copy, init_state(adapted.adapters, optimizer, jax.random.key(1), pruned=sparse))
    step = make_train_step(objective, optimizer)
    inputs = torch_side.batch(case.model_type)
    targets = {
        key: value
        for key, value in tiny.batch(
            task=case.task, num_labels=case.num_labels, length=torch_side.LENGTH, rows=torch_side.ROWS
        ).items()
        if key in ("positions", "labels", "weights")
    }
    for i in range(3):
        state, _ = step(state, adapted.frozen, {**inputs, **targets})
        if sparse and i == 1:
            state = prune_step(state, keep_counts(state.adapters["sites"], 0.5))
    save_adapter(
        directory,
        state.adapters,
        adapted.method,
        base=BaseInfo.of(model),
        masks=state.masks,
        target_modules=adapted.target_modules,
    )
    return Trained(case, base, model, adapted, state.adapters, state.masks, directory, inputs)
