"""The operations of a training step of BERT-base, 32 × 128 tokens, as XLA counts them. No weight is made and nothing is compiled."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.adapters import Lora
from jaxpeft.adapters.build import init_adapters
from jaxpeft.contextual import ContextualSparsity
from jaxpeft.contextual.estimators import estimator_shapes
from jaxpeft.models.shapes import model_shapes
from jaxpeft.targets import match_targets
from jaxpeft.tasks import task_for
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.step import init_state, make_train_step
from jaxpeft.trees import ESTIMATORS

ROWS, LENGTH, MASKED = 32, 128, 19
BERT_BASE = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12}
BERT_BASE |= {"num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512}
UPPER = {"feed_forward": (0.0,) * 6 + (0.9,) * 6, "attention": (0.0,) * 6 + (0.5,) * 6}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bound"), [("masked-lm", 0.75), ("classification", 0.70)])
def test_a_sparse_step_has_three_quarters_of_lora_s_operations(tmp_path, name, bound):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(BERT_BASE))
    task = task_for(name, 2 if name == "classification" else None)
    model = model_shapes(
        str(file),
        task.head,
        weights="random",
        num_labels=task.num_labels,
        dtype="float32",
        dropout=None,
        gradient_checkpointing=False,
        quantization=None,
        trained_leaves=lambda leaves, base_prefix: set(),
    )
    method = Lora(rank=8, alpha=16.0, dropout=0.1)
    targets = match_targets(model.sites(), ["query", "value"])
    frozen, adapters = jax.eval_shape(
        lambda params: init_adapters(params, method, targets, rng=jax.random.key(0)), model.params
    )
    frozen = {**frozen, ESTIMATORS: estimator_shapes(model, range(12))}
    optimizer = build_optimizer(lambda step: 1e-3, weight_decay=0.01, max_grad_norm=1.0)
    state = jax.eval_shape(lambda adapters: init_state(adapters, optimizer, jax.random.key(0), pruned=False), adapters)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    labels = (ROWS, MASKED) if name == "masked-lm" else (ROWS,)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": jax.ShapeDtypeStruct(labels, jnp.int32)}
    batch |= {"weights": jax.ShapeDtypeStruct(labels, jnp.float32)}
    batch |= {"positions": batch["labels"]} if name == "masked-lm" else {}

    def operations(settings):
        step = make_train_step(Objective(model, method, task, None, settings), optimizer)
        return step.lower(state, frozen, batch).cost_analysis()["flops"]

    lora = operations(None)
    assert operations(ContextualSparsity(**UPPER)) <= bound * lora
    # The choice itself, against channels drawn at random.
    chosen, drawn = (operations(ContextualSparsity(**UPPER, selection=way)) for way in ("svd", "random"))
    assert 0 < chosen - drawn <= 0.01 * lora
