from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Lora
from jaxpeft.inject import apply
from jaxpeft.training.objectives import Objective, take_positions

LABELS = SimpleNamespace(masked_lm_head=None)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_logits_at_the_masked_positions_are_those_of_the_whole_sequence(tiny_models, kind):
    """The head runs at the masked positions alone: same logits, same loss."""
    model, method = tiny_models(kind), Lora(rank=2)
    assert model.masked_lm_head
    frozen, adapters = tiny.adapted(model, method)
    batch, objective = tiny.batch(2), Objective(model, method)

    logits = objective.logits(frozen, adapters, {}, batch)
    assert logits.shape == (2, 3, tiny.VOCABULARY)
    whole = apply(model.module, frozen, adapters, method, **model.inputs(batch)).logits
    assert whole.shape == (2, tiny.SEQUENCE, tiny.VOCABULARY)
    expected = take_positions(whole, batch["positions"])
    chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(objective.loss(logits, batch), objective.loss(expected, batch), rtol=1e-5)


def test_a_head_that_is_not_known_gives_the_same_logits(bert):
    class Unknown(type(bert)):
        masked_lm_head = None

    frozen, adapters = tiny.adapted(bert, Lora(rank=2))
    batch = tiny.batch(2)
    unknown = Unknown(**{name: getattr(bert, name) for name in bert.__dataclass_fields__})
    known = Objective(bert, Lora(rank=2)).logits(frozen, adapters, {}, batch)
    chex.assert_trees_all_close(
        Objective(unknown, Lora(rank=2)).logits(frozen, adapters, {}, batch), known, rtol=1e-5, atol=1e-5
    )


def test_take_positions():
    x = jnp.arange(2 * 3 * 2).reshape(2, 3, 2)
    np.testing.assert_array_equal(take_positions(x, jnp.array([[2, 0], [1, 1]])), [[[4, 5], [0, 1]], [[8, 9], [8, 9]]])


def test_cross_entropy_is_a_weighted_sum_and_a_weight():
    """Two classes, logits 0 and ln 3: probabilities 1/4 and 3/4."""
    objective = Objective(LABELS, None, num_labels=2)
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]]))
    batch = {"labels": jnp.array([1, 0, 0]), "weights": jnp.array([1.0, 1.0, 0.0])}
    total, weight = objective.loss(logits, batch)
    assert float(total) == pytest.approx(np.log(4 / 3) + np.log(4), rel=1e-6)
    assert float(weight) == 2
    sums = objective.statistics(logits, batch)
    assert {key: float(value) for key, value in sums.items() if key != "loss"} == {"weight": 2, "correct": 1}


def test_regression_is_the_squared_error():
    objective = Objective(LABELS, None, num_labels=1)
    batch = {"labels": jnp.array([1.0, 2.0, 9.0]), "weights": jnp.array([1.0, 1.0, 0.0])}
    sums = objective.statistics(jnp.array([[1.5], [0.0], [0.0]]), batch)
    assert {key: float(value) for key, value in sums.items()} == {"loss": 0.25 + 4, "weight": 2}


def test_a_batch_without_weight_is_safe():
    objective = Objective(LABELS, None)
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
    shape = jax.eval_shape(lambda a: Objective(model, Lora(rank=2)).logits(frozen, a, {}, tiny.batch(2)), adapters)
    assert shape.dtype == jnp.float32
