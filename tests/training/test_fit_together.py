"""The loop of several runs: each ends as `fit` would end it alone, and what ends one leaves the others be."""

import math
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
import tiny
from test_loop import Recorder, saved_steps
from tiers import slow

from jaxpeft.adapters import Lora
from jaxpeft.errors import InputError
from jaxpeft.pruning import Criterion, Cubic, OneShot, Pruner, magnitude
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.loop import Outcome, RunState, fit
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import init_state, make_train_step
from jaxpeft.training.sweep import STACKED, Replicas, make_sweep_step, settings_of, stack, sweep_input_pipeline

METHOD = Lora(rank=2, alpha=4, dropout=0.1)
PLAN = Plan(
    num_steps=6,
    accumulation_steps=1,
    log_every_steps=2,
    eval_every_steps=2,
    metric="accuracy",
    learning_rate=lambda step: 1e-2,
    micro_steps_per_dispatch=4,
)

pytestmark = pytest.mark.xdist_group("fit-together")


class Batches:
    """Data of a seed, whose batches are made on the host."""

    def __init__(self, seed):
        self.seed, self.device_data = seed, {"none": np.zeros(1)}

    def draw(self, step):
        return tiny.batch(seed=1000 * self.seed + step)

    def assemble(self, device_data, draw, xp):
        return draw


class Trial:
    """Runs on a toy, one for each plan, with scripted validation scores; trained together, or each alone."""

    def __init__(self, directory, plans, *, scores=None, rates=None, stop_after=None):
        self.directory, self.plans, self.stop_after = directory, plans, stop_after
        self.scores = scores or [()] * len(plans)
        self.rates = rates or [1e-2] * len(plans)
        self.model, self.parallel = tiny.Toy(), data_parallel()
        self.objective = Objective(self.model, METHOD, MaskedLM())
        self.recorders = [Recorder() for _ in plans]
        starts = [tiny.adapted(self.model, METHOD, nonzero=False, seed=i) for i in range(len(plans))]
        self.frozen = self.parallel.replicate(starts[0][0])
        self.states = [
            self.parallel.replicate(
                init_state(
                    adapters,
                    self.optimizer(1e-2),
                    jax.random.key(i),
                    pruned=plan.pruning is not None,
                    remembers=plan.remembers,
                )
            )
            for i, (plan, (_, adapters)) in enumerate(zip(plans, starts, strict=True))
        ]

    def optimizer(self, rate):
        size = self.plans[0].accumulation_steps
        return build_optimizer(lambda step: rate, weight_decay=0.0, max_grad_norm=0.0, accumulation_steps=size)

    def validate(self, i):
        scores = iter(self.scores[i])
        return lambda state: {"accuracy": next(scores, 0.0)}

    def stop(self, recorder):
        return lambda: 15 if self.stop_after and recorder.advanced[-1] >= self.stop_after else None

    def together(self, *, states=None, progress=None):
        method, settings = settings_of([METHOD] * len(self.plans), self.rates)
        step = make_sweep_step(replace(self.objective, method=method), self.optimizer)
        source = sweep_input_pipeline([Batches(i) for i in range(len(self.plans))], self.parallel)
        checkpoints = [Checkpoints(self.directory / f"together{i}", "base") for i in range(len(self.plans))]
        states, progress = states or self.states, progress or [Progress()] * len(self.plans)
        runs = [
            RunState(plan, progress[i], states[i], self.validate(i), checkpoints[i], self.recorders[i])
            for i, plan in enumerate(self.plans)
        ]
        bar = Recorder()
        try:
            return fit(
                Replicas(stack(states), settings),
                self.frozen,
                runs,
                draw_at=source.draw_at,
                train_steps=source.train_steps(step, self.plans[0].micro_steps_per_dispatch),
                bar=bar,
                stop_requested=self.stop(bar),
                holding=STACKED,
            )
        finally:
            for each in checkpoints:
                each.close()

    def alone(self, i):
        recorder, checkpoints = Recorder(), Checkpoints(self.directory / f"alone{i}", "base")
        step = make_train_step(self.objective, self.optimizer(self.rates[i]))
        try:
            outcome = tiny.fit(
                tiny.copied(self.states[i]),
                self.frozen,
                self.plans[i],
                progress=Progress(),
                validate=self.validate(i),
                checkpoints=checkpoints,
                metrics_log=recorder,
                bar=recorder,
                stop_requested=lambda: None,
                **tiny.fed(step, self.parallel, batch_at=Batches(i).draw, most=4),
            )
        finally:
            checkpoints.close()
        return outcome, recorder


def assert_same(outcome, expected):
    assert isinstance(outcome, Outcome)
    assert replace(outcome.progress, seconds=0) == replace(expected.progress, seconds=0)
    chex.assert_trees_all_close(outcome.state.adapters, expected.state.adapters, atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_equal(outcome.state.masks, expected.state.masks)


def assert_same_lines(ours, theirs):
    assert [line[:2] for line in ours.lines] == [line[:2] for line in theirs.lines]
    for (_, _, own), (_, _, other) in zip(ours.lines, theirs.lines, strict=True):
        assert own.keys() == other.keys()
        for name in own.keys() - {"tokens_per_second"}:
            assert own[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


@Criterion
def smallest(sites, **context):
    """Another criterion than magnitude: its opposite."""
    return jax.tree.map(lambda leaf: -abs(leaf), sites)


@pytest.mark.parametrize(("accumulation_steps", "criterion"), [(1, magnitude), pytest.param(2, smallest, marks=slow)])
def test_every_run_is_what_it_would_be_alone(tmp_path, accumulation_steps, criterion):
    """Two of them are pruned after the same step, by one criterion or by two."""
    plans = [
        replace(PLAN, accumulation_steps=accumulation_steps),
        replace(PLAN, accumulation_steps=accumulation_steps, pruning=OneShot(0.5, 3)),
        replace(PLAN, accumulation_steps=accumulation_steps, pruning=Cubic(0.75, 1, 5, 1), pruner=Pruner(criterion)),
    ]
    # The two that are pruned have one rate, and so one program when they are alone.
    trial = Trial(tmp_path, plans, scores=[(0.1, 0.3, 0.2), (0.1, 0.2, 0.3), (0.4, 0.2, 0.1)], rates=[1e-2, 3e-2, 3e-2])
    for i, outcome in enumerate(trial.together()):
        expected, recorder = trial.alone(i)
        assert_same(outcome, expected)
        assert_same_lines(trial.recorders[i], recorder)
        assert saved_steps(tmp_path / f"together{i}") == saved_steps(tmp_path / f"alone{i}")
        assert outcome.seconds_per_step > 0


@pytest.mark.slow
def test_one_stops_early_and_the_others_go_on(tmp_path):
    plan = replace(PLAN, num_steps=8, patience=1)
    trial = Trial(tmp_path, [plan, plan], scores=[(0.3, 0.2), (0.1, 0.2, 0.3, 0.4)])
    first, second = trial.together()
    assert (first.progress.step, first.progress.best_step) == (4, 2)
    assert (second.progress.step, second.progress.best_step) == (8, 8)
    for i, outcome in enumerate((first, second)):
        assert_same(outcome, trial.alone(i)[0])


def test_a_loss_that_is_not_finite_ends_one_run(tmp_path):
    trial = Trial(tmp_path, [PLAN, PLAN], rates=[math.inf, 1e-2])
    failed, fine = trial.together()
    assert isinstance(failed, InputError)
    assert "the loss is nan at step" in str(failed)
    assert saved_steps(tmp_path / "together0") == []
    assert_same(fine, trial.alone(1)[0])


@pytest.mark.slow
def test_a_signal_saves_all_and_they_go_on_as_if_nothing_had_been(tmp_path):
    plans = [
        replace(PLAN, micro_steps_per_dispatch=1),
        replace(PLAN, micro_steps_per_dispatch=1, pruning=OneShot(0.5, 4)),
    ]
    trial = Trial(tmp_path, plans, stop_after=3)
    stopped = trial.together()
    assert [outcome.signal for outcome in stopped] == [15, 15]
    assert [outcome.progress.step for outcome in stopped] == [3, 3]
    states, progress = [], []
    for i, state in enumerate(trial.states):
        checkpoints = Checkpoints(tmp_path / f"together{i}", "base")
        restored = checkpoints.restore(state, checkpoints.latest)
        checkpoints.close()
        states.append(restored[0])
        progress.append(restored[1])
    trial.stop_after = None
    for i, outcome in enumerate(trial.together(states=states, progress=progress)):
        assert_same(outcome, trial.alone(i)[0])


def test_runs_at_different_steps_are_no_group(tmp_path):
    trial = Trial(tmp_path, [PLAN, PLAN])
    with pytest.raises(AssertionError, match="at the same step"):
        trial.together(progress=[Progress(2), Progress()])
