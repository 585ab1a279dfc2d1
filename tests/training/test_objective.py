from types import SimpleNamespace
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiers import slow, slow_but

from jaxpeft.adapters import Lora
from jaxpeft.inject import apply
from jaxpeft.tasks.classification import Classification
from jaxpeft.tasks.masked_lm import MaskedLM, take_positions
from jaxpeft.tasks.regression import Regression
from jaxpeft.training.objective import Objective

LABELS = SimpleNamespace(behind_attention=None)


@pytest.mark.parametrize(
    ("kind", "remat"),
    [
        ("bert", False),
        ("distilbert", False),
        *(pytest.param(kind, False, marks=slow) for kind in tiny.CONFIGS if kind not in ("bert", "distilbert")),
        pytest.param("bert", True, marks=slow),
        pytest.param("roberta", True, marks=slow),
    ],
)
def test_logits_at_the_masked_positions_are_those_of_the_whole_sequence(tiny_models, kind, remat):
    """Behind the last attention only the masked positions are computed: same logits, same loss, same gradients."""
    model, method = tiny_models(kind, **({"gradient_checkpointing": True} if remat else {})), Lora(rank=2)
    assert model.behind_attention
    frozen, adapters = tiny.adapted(model, method)
    batch, objective = tiny.batch(2), Objective(model, method, MaskedLM())

    def taken(adapters):
        return objective.logits(frozen, adapters, {}, batch)

    def whole(adapters):
        out = apply(model.module, frozen, adapters, method, **model.inputs(batch)).logits
        assert out.shape == (2, tiny.SEQUENCE, tiny.VOCABULARY)
        return take_positions(out, batch["positions"])

    def all_of(logits_of):
        """The gradient of the loss, the logits, and the loss as a sum and a weight."""

        def loss(adapters):
            logits = logits_of(adapters)
            total, weight = objective.loss(logits, batch)
            return total, (logits, (total, weight))

        return jax.jit(jax.grad(loss, has_aux=True))(adapters)

    (gradients, (logits, loss)), (expected, (whole_logits, whole_loss)) = all_of(taken), all_of(whole)
    assert logits.shape == (2, 3, tiny.VOCABULARY)
    chex.assert_trees_all_close(logits, whole_logits, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(loss, whole_loss, rtol=1e-5)
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", slow_but(tiny.CONFIGS, "roberta"))
def test_a_classifier_needs_the_first_token_alone(tiny_models, kind):
    model, method = tiny_models(kind, "classification"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method)
    batch = tiny.batch(2, task="classification")
    logits = Objective(model, method, Classification(2)).logits(frozen, adapters, {}, batch)
    whole = apply(model.module, frozen, adapters, method, **model.inputs(batch)).logits
    chex.assert_trees_all_close(logits, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", ["masked-lm", "classification"])
def test_what_is_not_asked_for_is_not_computed(tiny_models, task):
    """The last layer's feed-forward part sees the tokens that the head reads; those before it see all."""
    model = tiny_models("bert", task)
    frozen, adapters = tiny.adapted(model, Lora(rank=2))
    seen = {}

    def note(layer):
        def tap(x):
            seen[layer] = x.shape[1]
            return x

        return tap

    parts = ("attention/self/query", "attention/self/key", "intermediate/dense")
    layers = {f"bert/encoder/layer/{i}/{part}": note((i, part.rpartition("/")[2])) for i in (0, 1) for part in parts}

    def apply_noting(*args, input_hooks, **kwargs):
        return apply(*args, input_hooks={**input_hooks, **layers}, **kwargs)

    with mock.patch("jaxpeft.training.objective.apply", apply_noting):
        Objective(model, Lora(rank=2), tiny.task_of(model)).logits(frozen, adapters, {}, tiny.batch(2, task=task))
    asked = 3 if task == "masked-lm" else 1
    assert {part: seen[0, part] for part in ("query", "key", "dense")} == dict.fromkeys(
        ("query", "key", "dense"), tiny.SEQUENCE
    )
    assert [seen[1, part] for part in ("query", "key", "dense")] == [asked, tiny.SEQUENCE, asked]


def test_an_architecture_that_is_not_known_gives_the_same_logits(bert):
    class Unknown(type(bert)):
        model_type = "unknown"

    frozen, adapters = tiny.adapted(bert, Lora(rank=2))
    batch = tiny.batch(2)
    unknown = Unknown(**{name: getattr(bert, name) for name in bert.__dataclass_fields__})
    known = Objective(bert, Lora(rank=2), MaskedLM()).logits(frozen, adapters, {}, batch)
    chex.assert_trees_all_close(
        Objective(unknown, Lora(rank=2), MaskedLM()).logits(frozen, adapters, {}, batch), known, rtol=1e-5, atol=1e-5
    )


def test_take_positions():
    x = jnp.arange(2 * 3 * 2).reshape(2, 3, 2)
    np.testing.assert_array_equal(take_positions(x, jnp.array([[2, 0], [1, 1]])), [[[4, 5], [0, 1]], [[8, 9], [8, 9]]])


def test_cross_entropy_is_a_weighted_sum_and_a_weight():
    """Two classes, logits 0 and ln 3: probabilities 1/4 and 3/4."""
    objective = Objective(LABELS, None, Classification(2))
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]))
    batch = {"labels": jnp.array([1, 0, 0]), "weights": jnp.array([1.0, 1.0, 0.0])}
    total, weight = objective.loss(logits, batch)
    assert float(total) == pytest.approx(np.log(4 / 3) + np.log(4), rel=1e-6)
    assert float(weight) == 2
    sums = objective.statistics(logits, batch)
    assert {key: float(value) for key, value in sums.items() if key != "loss"} == {"weight": 2, "correct": 1}


def test_regression_is_the_squared_error():
    objective = Objective(LABELS, None, Regression(1))
    batch = {"labels": jnp.array([1.0, 2.0, 9.0]), "weights": jnp.array([1.0, 1.0, 0.0])}
    sums = objective.statistics(jnp.array([[1.5], [0.0], [0.0]]), batch)
    assert {key: float(value) for key, value in sums.items()} == {"loss": 0.25 + 4, "weight": 2}


def test_a_batch_without_weight_is_safe():
    objective = Objective(LABELS, None, MaskedLM())
    logits = jnp.asarray(tiny.normal(0, 2, 3, 5))
    batch = {"labels": jnp.zeros((2, 3), jnp.int32), "weights": jnp.zeros((2, 3))}
    assert [float(value) for value in objective.loss(logits, batch)] == [0, 0]
    assert {key: float(value) for key, value in objective.statistics(logits, batch).items()} == {
        "loss": 0,
        "weight": 0,
        "correct": 0,
    }


@pytest.mark.usefixtures("standard_promotion")
def test_logits_of_a_bf16_model_are_fp32(tiny_models):
    model = tiny_models("distilbert", dtype="bfloat16")
    frozen, adapters = tiny.adapted(model, Lora(rank=2))
    shape = jax.eval_shape(
        lambda a: Objective(model, Lora(rank=2), MaskedLM()).logits(frozen, a, {}, tiny.batch(2)), adapters
    )
    assert shape.dtype == jnp.float32
