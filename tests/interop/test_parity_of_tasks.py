"""The tasks with a loss of their own beside torch PEFT's, from the same weights: fifty updates, and the logits of the exported adapter."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import parity
import pytest
import tiny
import torch_side
from parity_cases import Case

from jaxpeft import load_model
from jaxpeft.tasks import task_for
from jaxpeft.training.objective import Objective

UPDATES, BATCHES = 50, 5
LORA = {"r": 4, "lora_alpha": 12}
TARGETS = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"]}


def multi_label(logits, labels):
    """As transformers' `problem_type` "multi_label_classification"."""
    import torch

    return torch.nn.BCEWithLogitsLoss()(logits, labels)


def pair_scoring(logits, labels):
    """As sentence-transformers' `BinaryCrossEntropyLoss`."""
    import torch

    return torch.nn.BCEWithLogitsLoss()(logits.view(-1), labels)


def weighted(logits, labels):
    import torch

    weight = torch.tensor(WEIGHTS, dtype=logits.dtype)
    return torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)(logits, labels.long())


WEIGHTS = (0.1, 2.0, 0.5)
TASKS = {
    "multi-label": (lambda: task_for("multi-label", 3), 3, multi_label),
    "pair-scoring": (lambda: task_for("pair-scoring", 1), 1, pair_scoring),
    "classification": (lambda: weighted_task(), 3, weighted),
}


def weighted_task():
    split = SimpleNamespace(labels=np.array([0, 1, 2]))
    splits = SimpleNamespace(train=split, label_names=None)
    return task_for("classification", 3).for_training(splits, label_smoothing=0.1, class_weights=list(WEIGHTS))


def batches(model_type, name):
    """Some batches of four rows, with labels as the task has them."""
    for seed in range(BATCHES):
        rng = np.random.default_rng(seed)
        batch = torch_side.batch(model_type)
        real = batch["attention_mask"] > 0
        ids = np.where(real, rng.integers(5, tiny.VOCABULARY, real.shape), batch["input_ids"]).astype(np.int32)
        labels = {
            "multi-label": (rng.random((4, 3)) < 0.4).astype(np.float32),
            "pair-scoring": rng.random(4).astype(np.float32),
            "classification": rng.integers(0, 3, 4).astype(np.int32),
        }[name]
        yield {**batch, "input_ids": ids, "labels": labels, "weights": np.ones(4, np.float32)}


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
@pytest.mark.parametrize("name", TASKS)
def test_fifty_updates_and_the_exported_adapter(name, model_type, tmp_path):
    """Losses to 1e-4, and logits of the exported adapter to 1e-5. Both sides train in float64, as in `test_parity`."""
    import torch

    make_task, num_labels, torch_loss = TASKS[name]
    base = torch_side.write_base(tmp_path / "base", model_type, "classification", num_labels=num_labels)
    model = load_model(str(base), "classification", num_labels=num_labels)
    case = Case(model_type, "classification", "LoraConfig", {**LORA, "target_modules": TARGETS[model_type]})
    pair = parity.make_pair(case, base, model, tmp_path / "theirs", trained=False)
    pair.peft.double()
    theirs = torch.optim.AdamW([p for p in pair.peft.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    ours, data = optax.adamw(1e-3, weight_decay=0.01), list(batches(model_type, name))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        double = parity.in_float64(pair)
        objective = Objective(double.model, double.method, make_task())
        adapters = double.adapters
        state = ours.init(adapters)

        @jax.jit
        def step(adapters, state, batch):
            def mean(adapters):
                total, weight = objective.loss(objective.logits(double.frozen, adapters, {}, batch), batch)
                return total / weight

            loss, gradients = jax.value_and_grad(mean)(adapters)
            updates, state = ours.update(gradients, state, adapters)
            return optax.apply_updates(adapters, updates), state, loss

        first = []
        for i in range(UPDATES):
            batch = data[i % BATCHES]
            inputs = parity.torch_inputs(SimpleNamespace(inputs=tokens_of(batch), model=model))
            loss = torch_loss(pair.peft(**inputs).logits, torch.tensor(batch["labels"]).double())
            theirs.zero_grad()
            loss.backward()
            theirs.step()
            adapters, state, our_loss = step(adapters, state, batch)
            assert abs(float(our_loss) - loss.item()) < 1e-4, f"update {i}"
            first.append(loss.item())
        assert np.mean(first[-BATCHES:]) < 0.98 * np.mean(first[:BATCHES])  # it learned
        adapters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), adapters)
    pair.save(tmp_path / "ours", adapters)
    assert torch_side.config_of(tmp_path / "ours")["task_type"] == "SEQ_CLS"
    exported = torch_side.load_peft(
        torch_side.load_torch(base, "classification", num_labels=num_labels), tmp_path / "ours"
    )
    objective = Objective(model, pair.method, make_task())
    for batch in data[:2]:
        logits = np.asarray(objective.logits(pair.frozen, adapters, {}, batch))
        assert logits.shape == (4, num_labels)
        np.testing.assert_allclose(logits, torch_side.torch_logits(exported, tokens_of(batch)), rtol=0, atol=1e-5)


def tokens_of(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
