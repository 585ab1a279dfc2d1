"""Runs with every schedule of pruning, from the loop to the checkpoint: resumed, together, on several devices, without another program."""

from collections import Counter
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_fit_together import Trial, assert_same, assert_same_lines
from test_loop import Recorder
from tiers import slow_but

from jaxpeft.adapters import Lora
from jaxpeft.adapters.entry_effects import of_product
from jaxpeft.pruning import SCORES, Cubic, OneShot, Pruner, Selection, sparsity_of, structure_of
from jaxpeft.pruning.at_start import AtStart
from jaxpeft.pruning.iterative import Iterative
from jaxpeft.pruning.rewire import RigL, Set
from jaxpeft.pruning.straight_through import StraightThrough
from jaxpeft.training import loop
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import init_state, make_train_step

PLAN = Plan(
    num_steps=8,
    accumulation_steps=2,
    log_every_steps=2,
    eval_every_steps=4,
    metric="accuracy",
    learning_rate=lambda step: 1e-2,
    micro_steps_per_dispatch=3,
)
METHOD = Lora(rank=4, dropout=0.2)
FACTORS = ("a", "b")


def pruner(criterion, *, structure="element", scope="tensor"):
    return Pruner(SCORES[criterion], Selection(FACTORS, structure_of(structure, METHOD.products), scope), of_product)


RUNS = {
    "at-start": (AtStart(0.5), pruner("random", structure="rank", scope="global")),
    "one-shot": (OneShot(0.5, 3), pruner("snip", scope="global")),
    "cubic": (Cubic(0.5, 1, 6, 2), pruner("movement", structure="2:4")),
    "iterative": (Iterative(0.6, (3, 5, 6), 2), pruner("product", scope="layer")),
    "rigl": (RigL(0.6, 6, 2, 0.5), pruner("magnitude")),
    "set": (Set(0.6, 6, 2, 0.5), pruner("magnitude", structure="4x2")),
    "straight-through": (StraightThrough(0.6, 1, 7, 2), pruner("movement", scope="global")),
}

pytestmark = pytest.mark.xdist_group("fit-together")


class Counts:
    """A log of kept entries that remembers."""

    def __init__(self):
        self.lines = []

    def write(self, step, masks, before):
        self.lines.append((step, {path: {k: int(m.sum()) for k, m in g.items()} for path, g in masks.items()}))


class Run:
    """A toy's runs by one schedule: they share a compiled step, and each has checkpoints of its own."""

    def __init__(self, schedule, pruner):
        self.plan = replace(PLAN, pruning=schedule, pruner=pruner)
        self.parallel, self.traces = data_parallel(), Counter()
        options = {"accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
        self.objective, self.optimizer, frozen, self.start = tiny.training(tiny.Toy(), METHOD, **options)
        self.frozen = self.parallel.replicate(frozen)
        self.step = make_train_step(self.objective, self.optimizer, self.traces)

    def fit(self, directory, *, stop_after=None, progress=None):
        state = init_state(
            self.start.adapters, self.optimizer, jax.random.key(7), pruned=True, remembers=self.plan.remembers
        )
        state = self.parallel.replicate(state)
        checkpoints, recorder, counts = Checkpoints(directory, "base"), Recorder(), Counts()
        if progress:
            state, progress = checkpoints.restore(state, progress)
        run = loop.RunState(
            self.plan,
            progress or Progress(),
            state,
            lambda state: {"accuracy": 0.0},
            checkpoints,
            recorder,
            sparsity_log=counts,
        )
        (outcome,) = loop.fit(
            state,
            self.frozen,
            [run],
            **tiny.fed(self.step, self.parallel, most=3),
            bar=recorder,
            stop_requested=lambda: 15 if stop_after and recorder.advanced[-1] >= stop_after else None,
        )
        checkpoints.close()
        return outcome, recorder, counts


@pytest.mark.parametrize("name", slow_but(RUNS, "rigl", "straight-through"))
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, name):
    """Bit for bit, over four devices, with accumulation, clipping, decay and dropout; and no step is compiled twice."""
    run = Run(*RUNS[name])
    whole, recorder, counts = run.fit(tmp_path / "whole")
    stopped, _, first = run.fit(tmp_path / "parts", stop_after=4)
    assert stopped.progress.step == 4
    resumed, lines, second = run.fit(tmp_path / "parts", progress=4)
    chex.assert_trees_all_equal(tiny.snapshot(resumed.state), tiny.snapshot(whole.state))
    assert first.lines + second.lines == counts.lines
    assert run.traces == {(4, tiny.SEQUENCE): 1}
    schedule = run.plan.pruning
    changes = [step for step in range(9) if schedule.changes_masks_at(step)]
    assert [step for step, _ in counts.lines] == changes == recorder.steps("pruning")
    assert [step for step in changes if step > 4] == lines.steps("pruning")
    rows = {step: metrics for step, split, metrics in recorder.lines if split == "pruning"}
    assert all(0 <= row["mask_churn"] <= 1 for row in rows.values())
    assert rows[changes[0]]["mask_churn"] == pytest.approx(rows[changes[0]]["sparsity"])
    # What is pruned is zero in the end, and the counts are those that the schedule asks for.
    state = whole.state
    for site, masks in zip(state.adapters["sites"].values(), state.masks.values(), strict=True):
        for key, mask in masks.items():
            np.testing.assert_array_equal(np.asarray(site[key])[~np.asarray(mask)], 0)
            assert mask.any()
    assert rows[changes[-1]]["sparsity"] == sparsity_of(state.masks)


def test_the_gradient_of_a_pruned_entry_is_what_it_would_be_dense():
    """RigL's growth, by finite differences: the loss as a pruned entry of A leaves zero."""
    objective, optimizer, frozen, state = tiny.training(quiet(), Lora(rank=4))
    sites = tiny.adapted(tiny.Toy(), Lora(rank=4))[1]["sites"]
    masks = tiny.half_masks({"sites": sites})
    state = init_state(
        {"sites": sites, "modules": {}}, optimizer, jax.random.key(0), pruned=True, remembers=["gradient"]
    )
    state = replace(state, masks=masks)
    batch = tiny.batch()
    new, metrics = make_train_step(objective, optimizer)(tiny.copied(state), frozen, batch)
    row, column = map(int, np.argwhere(~np.asarray(masks["up"]["a"]))[0])

    def loss(value):
        moved = {
            **sites,
            "up": {**sites["up"], "a": jnp.where(masks["up"]["a"], sites["up"]["a"], 0).at[row, column].set(value)},
        }
        all_kept = {**masks, "up": {**masks["up"], "a": masks["up"]["a"].at[row, column].set(True)}}
        total, weight = objective.loss(
            objective.logits(frozen, {"sites": moved, "modules": {}}, all_kept, batch), batch
        )
        return total / weight

    assert float(jax.jit(jax.grad(loss))(0.0)) == pytest.approx(
        float(new.memory["gradient"]["up"]["a"][row, column]), rel=1e-4
    )
    assert float(new.adapters["sites"]["up"]["a"][row, column]) == 0
    # The reported norm is that of the gradients that train: those of kept entries.
    kept = jax.tree.map(lambda g, m: jnp.where(m, g, 0), new.memory["gradient"], masks)
    norm = np.sqrt(sum(float(jnp.square(leaf).sum()) for leaf in jax.tree.leaves(kept)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def quiet():
    toy = tiny.Toy()
    toy.module = tiny.Toy.Module(dropout=0.0)
    return toy


@pytest.mark.slow
def test_what_is_remembered_changes_no_step():
    """A run that remembers gradients trains as one that does not: bit for bit without masks, and with them."""
    objective, optimizer, frozen, _ = tiny.training(quiet(), Lora(rank=4))
    sites = tiny.adapted(tiny.Toy(), Lora(rank=4))[1]["sites"]
    step = make_train_step(objective, optimizer)
    results = []
    for remembers in ((), ("movement",), ("gradient",), ("soft",)):
        state = init_state(
            {"sites": sites, "modules": {}}, optimizer, jax.random.key(0), pruned=True, remembers=remembers
        )
        state = replace(state, masks=tiny.copied(tiny.half_masks({"sites": sites})))
        for i in range(3):
            state, _ = step(state, frozen, tiny.batch(seed=i))
        results.append(tiny.snapshot(state.adapters))
    for other in results[1:]:
        chex.assert_trees_all_close(other, results[0], rtol=1e-6, atol=1e-7)


SHARED = {
    "some": ["rigl", "straight-through", "at-start"],
    "others": ["one-shot", "1:2", "iterative", "set"],
}


@pytest.mark.slow
@pytest.mark.parametrize("names", SHARED)
def test_runs_with_different_schedules_share_a_program(tmp_path, names):
    """Each is what it is alone, and one of them is dense."""
    base = replace(PLAN, accumulation_steps=1, num_steps=8)
    kinds = {**RUNS, "1:2": (Cubic(0.5, 1, 6, 2), pruner("magnitude", structure="1:2"))}
    plans = [base, *(replace(base, pruning=kinds[name][0], pruner=kinds[name][1]) for name in SHARED[names])]
    trial = Trial(tmp_path, plans)
    for i, outcome in enumerate(trial.together()):
        expected, recorder = trial.alone(i)
        assert_same(outcome, expected)
        chex.assert_trees_all_close(outcome.state.memory, expected.state.memory, atol=1e-5, rtol=1e-4)
        assert_same_lines(trial.recorders[i], recorder)
