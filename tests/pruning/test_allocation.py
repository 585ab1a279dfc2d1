"""AdaLoRA's budget and who gets it, by hand and beside PEFT's RankAllocator."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.pruning.allocation import Allocation, keep_important, triplet_scores, update_importance

SCHEDULE = Allocation(init_r=6, target_r=2, begin_step=10, last_step=80, every_steps=5, beta1=0.85, beta2=0.85)


def test_the_budget_and_its_days_by_hand():
    """From 18 to 6: 6 + 12·((80 − t)/70)³, whole numbers below it, as PEFT's int()."""
    assert [SCHEDULE.budget_at(step, 3) for step in (1, 10, 11, 15, 45, 79, 80)] == [18, 18, 17, 15, 7, 6, 6]
    assert [step for step in range(1, 101) if SCHEDULE.due(step)] == [*range(15, 80, 5), 80]
    off = replace(SCHEDULE, every_steps=30)
    assert [step for step in range(1, 101) if off.due(step)] == [30, 60, 80]


def test_the_budget_is_peft_s():
    from types import SimpleNamespace

    from peft.tuners.adalora.layer import RankAllocator

    for init_r, target_r, tinit, tfinal, delta, total in [
        (12, 8, 0, 0, 1, 50),
        (7, 3, 5, 9, 4, 61),
        (5, 4, 20, 1, 3, 40),
    ]:
        config = SimpleNamespace(
            init_r=init_r,
            target_r=target_r,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=delta,
            total_step=total,
            beta1=0.5,
            beta2=0.5,
        )
        layers = {f"{i}.lora_A.default": np.zeros((init_r, 2)) for i in range(5)}
        for array in layers:
            layers[array] = SimpleNamespace(size=lambda axis, rank=init_r: rank)
        allocator = RankAllocator(
            SimpleNamespace(named_parameters=lambda layers=layers: layers.items()), config, "default"
        )
        ours = Allocation(init_r, target_r, tinit, total - tfinal, delta, 0.5, 0.5)
        for step in range(1, total - tfinal + 1):
            budget, due = allocator.budget_schedule(step)
            assert (ours.budget_at(step, 5), ours.due(step)) == (budget, due or step == total - tfinal), step


SITES = {
    "one": {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[3.0], [-1.0]]), "e": jnp.array([[1.0, 1.0]])},
    "two": {"a": jnp.array([[1.0]]), "b": jnp.array([[1.0]]), "e": jnp.array([[4.0]])},
}


def test_scores_by_hand():
    """With no past and both decays ½: |w·g| = i, sensitivity i/2, uncertainty |i − i/2|/2 = i/4, score i²/8."""
    importance = {name: jax.tree.map(jnp.zeros_like, SITES) for name in ("sensitivity", "uncertainty")}
    grads = jax.tree.map(jnp.ones_like, SITES)
    importance = update_importance(importance, SITES, grads, beta1=0.5, beta2=0.5)
    scores = triplet_scores(importance)
    np.testing.assert_allclose(scores["one"], [(1 + 1 + 9) / 8, (1 + 4 + 1) / 8])
    np.testing.assert_allclose(scores["two"], [(16 + 1 + 1) / 8])
    kept = {budget: keep_important(importance, budget) for budget in (3, 2, 1, 0)}
    assert {b: (k["one"]["e"].tolist(), k["two"]["e"].tolist()) for b, k in kept.items()} == {
        3: ([[True, True]], [[True]]),
        2: ([[True, False]], [[True]]),
        1: ([[False, False]], [[True]]),
        0: ([[False, False]], [[False]]),
    }


def test_triplets_as_important_as_the_last_that_falls_fall_too():
    importance = {name: jax.tree.map(jnp.ones_like, SITES) for name in ("sensitivity", "uncertainty")}
    assert not any(k["e"].any() for k in keep_important(importance, 2).values())
