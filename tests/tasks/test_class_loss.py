"""Smoothed labels and weighted classes: torch's `CrossEntropyLoss`, whatever the passes; and what the weights are made of."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Lora
from jaxpeft.config import DataConfig, RunConfig, TrainingConfig
from jaxpeft.data import Split, Splits
from jaxpeft.errors import InputError
from jaxpeft.tasks import task_for
from jaxpeft.tasks.class_loss import cross_entropy, weights_of_classes
from jaxpeft.tasks.classification import Classification
from jaxpeft.training.micro_batches import WHOLE, MicroBatches
from jaxpeft.training.objective import Objective
from jaxpeft.training.step import make_train_step

NAMES = ("ham", "spam", "other")
LABELS = np.array([0, 0, 0, 1, 0, 1, 0, 0], np.int32)
WEIGHTS = {"none": None, "some": (0.2, 3.0, 0.0), "small": (0.001, 0.004, 0.01)}


def splits_of(labels, names=NAMES):
    split = Split([f"text {i}" for i in range(len(labels))], None, np.asarray(labels, np.int32))
    return Splits(split, split, None, len(names), names, "rows of a test")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("which", WEIGHTS)
def test_it_is_torch_s(which, smoothing):
    import torch

    logits, labels, each = tiny.normal(0, 16, 3), np.random.default_rng(1).integers(0, 3, 16), WEIGHTS[which]
    weights = np.ones(16, np.float32)
    weights[12:] = 0  # rows that pad a batch

    @jax.value_and_grad
    def ours(logits):
        total, weight = cross_entropy(
            logits, jnp.asarray(labels, jnp.int32), weights, smoothing=smoothing, class_weights=each
        )
        return total / weight

    loss, gradient = ours(jnp.asarray(logits))
    theirs = torch.tensor(logits[:12], requires_grad=True)
    criterion = torch.nn.CrossEntropyLoss(
        weight=None if each is None else torch.tensor(each), label_smoothing=smoothing
    )
    expected = criterion(theirs, torch.tensor(labels[:12]))
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient[:12], theirs.grad, atol=1e-6)
    np.testing.assert_array_equal(gradient[12:], 0)


@pytest.mark.parametrize("each", [(0.2, 3.0), (0.001, 0.004)])
def test_a_step_is_torch_s_mean_in_any_number_of_passes(tiny_models, each):
    """Also if the sum of the weights in a batch is below 1."""
    import torch

    model, found = tiny_models("bert", "classification", dropout=0.0), {}
    batch = {**tiny.batch(8, task="classification"), "weights": np.array([1] * 7 + [0], np.float32)}
    for name, micro_batches in (("whole", WHOLE), ("three", MicroBatches(rows=3))):
        _, optimizer, frozen, state = tiny.training(model, Lora(rank=2))
        task = Classification(2, label_smoothing=0.1, class_weights=each)
        objective = Objective(model, Lora(rank=2), task)
        logits = np.asarray(objective.logits(frozen, state.adapters, {}, batch))
        state, metrics = make_train_step(objective, optimizer, micro_batches=micro_batches)(state, frozen, batch)
        found[name] = tiny.snapshot((state.adapters, metrics))
    chex.assert_trees_all_close(*found.values(), rtol=1e-5, atol=1e-6)
    criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor(each), label_smoothing=0.1)
    expected = criterion(torch.tensor(logits[:7]), torch.tensor(batch["labels"][:7], dtype=torch.long))
    assert found["whole"][1]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_reported_stays_plain():
    task = Classification(2, label_smoothing=0.1, class_weights=(1.0, 5.0))
    logits, batch = jnp.asarray(tiny.normal(0, 4, 2)), tiny.batch(4, task="classification")
    assert task.loss(logits, batch) == Classification(2).loss(logits, batch)
    assert task.training_loss(logits, batch) != task.loss(logits, batch)


def test_balanced_weights_are_scikit_learn_s():
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.arange(2), y=LABELS)
    assert weights_of_classes("balanced", LABELS, NAMES[:2]) == pytest.approx(tuple(expected))
    # A class without a row has nothing to weigh, and no smoothed label goes to it.
    assert weights_of_classes("balanced", LABELS, NAMES) == pytest.approx((*expected, 0.0))


def test_weights_by_name_and_in_order():
    assert weights_of_classes({"spam": 3}, LABELS, NAMES) == (1.0, 3.0, 1.0)
    of_ids = TrainingConfig(class_weights={1: 3.0}).class_weights
    assert weights_of_classes(of_ids, LABELS, ["0", "1"]) == (1.0, 3.0)
    assert weights_of_classes([1, 2, 0], LABELS, NAMES) == (1.0, 2.0, 0.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"spm": 3.0}, "there is no class 'spm'; did you mean 'spam'"),
        ({"x": 3.0}, "there is no class 'x'; classes: ham, spam, other"),
        ([1.0, 2.0], r"has 2 weights, and there are 3 classes \(ham, spam, other\); give one for each"),
        ([0.0, 0.0, 1.0], "no training row has a class with a weight above 0"),
        ({"ham": 0.0, "spam": 0.0}, "no training row has a class with a weight above 0"),
    ],
)
def test_weights_that_do_not_fit_the_classes(given, message):
    with pytest.raises(InputError, match=rf"^training\.class_weights.*{message}"):
        task_for("classification", 3).for_training(splits_of(LABELS), class_weights=given)


def test_the_options_by_name():
    task = task_for("classification", 3).for_training(splits_of(LABELS), label_smoothing=0.1, class_weights={"spam": 2})
    found = task.loss_options(NAMES)
    assert found == {"label_smoothing": 0.1, "class_weights": {"ham": 1.0, "spam": 2.0, "other": 1.0}}
    assert task_for("classification", 3).loss_options(NAMES) == {}


def test_numbers_have_no_classes():
    with pytest.raises(InputError, match=r"training\.label_smoothing is for tasks that choose one class .* regression"):
        task_for("classification", 1).for_training(splits_of(LABELS), label_smoothing=0.1)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("classification", {"label_smoothing": 1.0}, r"training\.label_smoothing is 1.0; .* below 1"),
        ("classification", {"label_smoothing": -0.1}, r"training\.label_smoothing is -0.1"),
        ("classification", {"class_weights": [1.0, -1.0]}, "numbers of at least 0"),
        ("classification", {"class_weights": {"a": float("inf")}}, "numbers of at least 0"),
        ("classification", {"class_weights": [0.0, 0.0]}, "one of them above 0"),
        ("classification", {"class_weights": []}, "one of them above 0"),
        ("classification", {"class_weights": "balance"}, "it must be one of balanced"),
        ("masked-lm", {"class_weights": "balanced"}, "class_weights balanced is for classification.*masked-lm; leave"),
        ("masked-lm", {"label_smoothing": 0.1}, "label_smoothing 0.1 is for classification"),
    ],
)
def test_values_that_no_run_can_use(task, options, message):
    with pytest.raises(InputError, match=message):
        RunConfig(task=task, data=DataConfig(train_file="a.csv"), training=TrainingConfig(**options))
