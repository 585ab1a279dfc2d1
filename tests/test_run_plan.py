"""The plan of a run: its warm-up, and the metric that chooses the adapter."""

import pytest

from jaxpeft.config import PruningConfig, TrainingConfig
from jaxpeft.errors import InputError
from jaxpeft.runs.schedule import make_plan
from jaxpeft.tasks import task_for


def plan(**training):
    return make_plan(TrainingConfig(**training), PruningConfig(), batches_per_epoch=30, metric="accuracy")


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (90, 9), (1000, 100), (5000, 100)])
def test_the_default_warm_up_is_a_tenth_of_the_run_but_at_most_100_steps(steps, warmup):
    made = plan(num_steps=steps)
    assert made.warmup_steps == warmup
    assert float(made.learning_rate(warmup)) == pytest.approx(TrainingConfig().learning_rate)
    if warmup:
        assert float(made.learning_rate(warmup // 2)) < TrainingConfig().learning_rate


def test_a_given_warm_up_stays_as_it_is():
    assert plan(num_steps=50, warmup_steps=40).warmup_steps == 40
    assert plan(num_epochs=1, warmup_steps=0).warmup_steps == 0
    with pytest.raises(InputError, match=r"training\.warmup_steps 100 is not below the run's 30 steps"):
        plan(num_epochs=1, warmup_steps=100)


def test_the_metric_is_the_tasks_own_or_the_given_one():
    assert plan().metric == "accuracy"
    assert plan(metric="loss").metric == "loss"


@pytest.mark.parametrize(
    ("task", "num_labels", "metric", "measured"),
    [
        ("classification", 3, "matthews", "classification with 3 classes; choose from loss, accuracy, f1$"),
        ("classification", 2, "pearson", "classification with 2 classes; choose from loss, accuracy, f1, matthews$"),
        ("classification", 1, "accuracy", "regression; choose from loss, pearson, spearman$"),
        ("masked-lm", None, "f1", "masked language modelling; choose from loss, perplexity, accuracy$"),
    ],
)
def test_a_metric_that_this_data_does_not_measure_is_refused(task, num_labels, metric, measured):
    found = task_for(task, num_labels)
    with pytest.raises(InputError, match=rf"training\.metric '{metric}' is not measured in this {measured}"):
        found.check_metric(metric)
    for name in (None, "loss", *found.metrics):
        found.check_metric(name)


def test_f1_is_named_by_what_it_is_of():
    assert task_for("classification", 2).metric_title("f1", ("no", "yes")) == "F1 of 'yes'"
    assert task_for("classification", 2).metric_title("f1", None) == "F1 of '1'"
    assert task_for("classification", 3).metric_title("f1", None) == "F1 (macro mean)"
    assert task_for("classification", 3).metric_title("accuracy", None) == "accuracy"
