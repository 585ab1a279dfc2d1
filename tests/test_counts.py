"""The parameter counts of the document that this project grew from (METHODS, section 0), at full size."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from tiers import slow_but

from jaxpeft import count, load_model
from jaxpeft.config import AdapterConfig, DataConfig, RunConfig
from jaxpeft.models import build
from jaxpeft.runs.adapters import fully_trained
from jaxpeft.tasks import task_for
from jaxpeft.trees import leaf_paths

# model type, task, target modules → (total, in adapters, in a head that trains whole)
COUNTS = {
    ("distilbert", "masked-lm", ("q_lin", "v_lin")): (67_132_986, 147_456, 0),
    ("bert", "masked-lm", ("query", "value")): (109_809_210, 294_912, 0),
    ("distilbert", "classification", ("q_lin", "v_lin")): (67_102_466, 147_456, 592_130),
    ("bert", "classification", ("query", "value")): (109_778_690, 294_912, 1_538),
}


def zeros(model, paths, seed):
    """Stands in for drawing a hundred million numbers; the shapes are the model's own."""
    shapes = leaf_paths(jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 1))))
    return {path: np.zeros(shapes[path].shape, np.float32) for path in paths}


@pytest.mark.parametrize(
    "case",
    slow_but(
        COUNTS, ("distilbert", "masked-lm", ("q_lin", "v_lin")), ("distilbert", "classification", ("q_lin", "v_lin"))
    ),
)
def test_published_counts(case, tmp_path, monkeypatch):
    from transformers import AutoConfig

    model_type, task, targets = case
    monkeypatch.setattr(build, "_draw", zeros)
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    config = RunConfig(
        task=task,
        data=DataConfig(train_file="none.txt"),
        adapter=AdapterConfig(method="lora", rank=8, target_modules=list(targets)),
    )
    model = load_model(
        str(tmp_path),
        task,
        weights="random",
        num_labels=2 if task == "classification" else None,
        trained_leaves=lambda leaves, prefix: fully_trained(config.adapter, task_for(task, 2), leaves, prefix),
    )
    total, in_adapters, in_head = COUNTS[case]
    for method in ("lora", "hira"):
        adapted = tiny.prepared(replace(config, adapter=replace(config.adapter, method=method)), model)
        assert count(adapted.adapters["sites"]) == in_adapters
        assert count(adapted.adapters["modules"]) == in_head
        assert count(adapted.frozen) + count(adapted.adapters) == total
    if (model_type, task) == ("distilbert", "masked-lm"):
        assert f"{100 * in_adapters / total:.2f} %" == "0.22 %"
