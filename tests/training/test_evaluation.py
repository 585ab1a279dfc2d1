from collections import Counter

import jax
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Lora
from jaxpeft.tasks.classification import Classification
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.tasks.regression import Regression
from jaxpeft.training.evaluation import (
    evaluate,
    pseudo_perplexity,
)
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import make_eval_step

NOTHING = ({}, {}, {})  # frozen, adapters, masks


def test_a_masked_lm_is_judged_by_all_its_tokens():
    """Metrics of two unequal batches, not means of means; without dropout; one program."""
    parallel = data_parallel()
    objective, _, frozen, state = tiny.training(tiny.Toy(), Lora(rank=4, dropout=0.5))
    batches = [tiny.batch(4, seed=0), tiny.batch(4, seed=1)]
    batches[1]["weights"][2:] = 0  # rows that fill the last batch up
    traces: Counter = Counter()
    step = make_eval_step(objective, traces)
    metrics = MaskedLM().measure(*evaluate(step, parallel, frozen, state.adapters, {}, batches, MaskedLM().gathered))
    losses, right = [], []
    for batch, rows in zip(batches, (4, 2), strict=True):
        logits = objective.logits(frozen, state.adapters, {}, batch)
        losses += np.asarray(objective.task.losses(logits, batch))[:rows].ravel().tolist()
        right += (np.asarray(logits).argmax(-1) == batch["labels"])[:rows].ravel().tolist()
    expected = {"loss": np.mean(losses), "perplexity": np.exp(np.mean(losses)), "accuracy": np.mean(right)}
    assert metrics == pytest.approx(expected, rel=1e-5)
    pseudo = pseudo_perplexity(step, parallel, frozen, state.adapters, {}, batches)
    assert pseudo == pytest.approx(expected["perplexity"], rel=1e-5)
    assert traces == {(4, tiny.SEQUENCE): 1}


def classifier(num_labels):
    """A step whose logits are the first tokens of each row; and two batches of six rows, out of order, with filling."""
    task = Regression(1) if num_labels == 1 else Classification(num_labels)

    @jax.jit
    def step(frozen, adapters, masks, batch):
        logits = batch["input_ids"][:, :num_labels].astype("float32") / 50
        return task.statistics(logits, batch), logits

    batches = []
    for i, rows in enumerate([[5, 0, 3, 1], [2, 4, -1, -1]]):
        batch = tiny.batch(task="classification", num_labels=num_labels, seed=i)
        rows = np.array(rows, np.int32)
        batches.append({**batch, "rows": rows, "weights": (rows >= 0).astype(np.float32)})
    return step, batches


def in_order(batches, values):
    """`values` of the batches' real rows, in the order of the rows."""
    rows = np.concatenate([batch["rows"] for batch in batches])
    return np.concatenate(values)[[list(rows).index(row) for row in range(6)]]


def test_a_classifier_is_judged_on_its_real_rows():
    step, batches = classifier(3)
    task = Classification(3, ("accuracy", "f1"))
    metrics = task.measure(*evaluate(step, data_parallel(), *NOTHING, batches, task.gathered))
    logits = in_order(batches, [batch["input_ids"][:, :3] / 50 for batch in batches])
    labels = in_order(batches, [batch["labels"] for batch in batches])
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), labels]
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert set(metrics) == {"loss", "accuracy", "f1"}


def test_a_regression_is_judged_by_its_error_and_correlations():
    step, batches = classifier(1)
    for batch in batches:
        batch["labels"] = batch["input_ids"][:, 0].astype(np.float32) / 25 + np.float32(1)
    task = Regression(1, ("pearson", "spearman"))
    metrics = task.measure(*evaluate(step, data_parallel(), *NOTHING, batches, task.gathered))
    values = in_order(batches, [batch["input_ids"][:, 0] / 50 for batch in batches])
    expected = {"loss": np.square(values + 1).mean(), "pearson": 1, "spearman": 1}
    assert metrics == pytest.approx(expected, rel=1e-5)
