"""The loop: on a toy where its arithmetic counts, and on scripted losses and validations where only its order does."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Lora
from jaxpeft.errors import InputError
from jaxpeft.pruning import Criterion, Cubic, OneShot, Pruner, Selection
from jaxpeft.training import loop
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import TrainState, make_train_step

PLAN = Plan(
    num_steps=6,
    accumulation_steps=1,
    log_every_steps=2,
    eval_every_steps=2,
    metric="accuracy",
    learning_rate=lambda step: 0.1,
)
DRAW = {"rows": np.arange(4)}


class Recorder:
    """A log and a bar that remember; `lines` are (step, split, metrics)."""

    def __init__(self):
        self.lines, self.advanced = [], []

    def write(self, step, split, metrics):
        self.lines.append((step, split, metrics))

    def advance(self, step):
        self.advanced.append(step)

    def show(self, step, *, loss, tokens_per_second, seconds_left):
        assert np.isfinite([loss, tokens_per_second, seconds_left]).all()

    def steps(self, split):
        return [step for step, name, _ in self.lines if name == split]


def measured(losses):
    """The metrics of passes with these losses, 32 tokens each, and an entry behind them that does not count."""
    values = jnp.array([*losses, math.nan], jnp.float32)
    return {"loss": values, "grad_norm": jnp.zeros_like(values), "tokens": jnp.full(len(values), 32)}


def empty_state():
    sites = {"layer": {"a": jnp.arange(1.0, 9)[None], "b": jnp.arange(1.0, 5)[None]}}
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), sites)
    return TrainState(jnp.int32(0), {"sites": sites, "modules": {}}, masks, (), jax.random.key(0))


def scripted(
    directory,
    plan,
    *,
    losses=None,
    scores=(),
    progress=None,
    stop_after=None,
    recorder=None,
    dispatched=measured,
    validate_start=None,
):
    """Run `fit` on losses (one a pass) and validation scores (one a validation) that are given; `dispatched` makes metrics of the first."""
    recorder, losses, scores = recorder or Recorder(), iter(losses or itertools.repeat(1.0)), iter(scores)
    checkpoints = Checkpoints(directory, "base")

    def train_steps(state, frozen, draws):
        found = [next(losses) for _ in draws]
        return replace(state, micro_step=state.micro_step + len(draws)), dispatched(found)

    try:
        return tiny.fit(
            empty_state(),
            {},
            plan,
            progress=progress or Progress(),
            draw_at=lambda step: DRAW,
            train_steps=train_steps,
            validate=lambda state: {plan.metric: next(scores, 0.0)},
            checkpoints=checkpoints,
            metrics_log=recorder,
            bar=recorder,
            stop_requested=lambda: 15 if stop_after and recorder.advanced[-1] >= stop_after else None,
            validate_start=validate_start,
        )
    finally:
        checkpoints.close()


class Queued:
    """An array of a dispatch that is not done before somebody waits for it."""

    def __init__(self, number, values, events):
        self.number, self.values, self.events = number, np.asarray(values), events

    def block_until_ready(self):
        self.events.append(f"waited for {self.number}")

    def __array__(self, dtype=None, copy=None):
        return self.values


def saved_steps(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def test_the_devices_have_one_dispatch_queued_and_never_more(tmp_path):
    """So that a signal waits for that one, and not for a whole log interval; the metrics themselves are fetched at its end."""
    events = []

    def dispatched(losses):
        number = sum(event.startswith("dispatched") for event in events)
        events.append(f"dispatched {number}")
        metrics = measured(losses)
        return {**metrics, "loss": Queued(number, metrics["loss"], events)}

    scripted(tmp_path, replace(PLAN, num_steps=4, log_every_steps=4), dispatched=dispatched)
    assert events == [
        *(
            "dispatched 0",
            "dispatched 1",
            "waited for 0",
            "dispatched 2",
            "waited for 1",
            "dispatched 3",
            "waited for 2",
        ),
    ]


@pytest.mark.parametrize(
    ("accumulation_steps", "most", "sizes"), [(1, 4, [4, 4]), (3, 7, [6, 2]), (4, 3, [3, 1, 3, 1])]
)
def test_dispatches_end_where_an_update_does(accumulation_steps, most, sizes):
    plan, done = replace(PLAN, accumulation_steps=accumulation_steps), 0
    for size in sizes:
        assert min(plan.up_to_whole_steps(done, most), 8 - done) == size
        done += size
    assert plan.up_to_whole_steps(5, 10) == {1: 10, 3: 1, 4: 3}[accumulation_steps]


def test_updates_logs_and_validations_come_when_they_are_due(tmp_path):
    recorder = Recorder()
    plan = replace(PLAN, num_steps=7, accumulation_steps=3, log_every_steps=2, eval_every_steps=3)
    outcome = scripted(tmp_path, plan, scores=[0.1, 0.3, 0.2], recorder=recorder)
    assert recorder.advanced == [1, 2, 3, 4, 5, 6, 7]
    assert recorder.steps("train") == [2, 4, 6, 7]  # the last is off the interval
    assert recorder.steps("validation") == [3, 6, 7]
    assert int(outcome.state.micro_step) == 21
    assert replace(outcome.progress, seconds=0) == Progress(7, best_step=6, best_score=0.3, since_best=1)
    assert outcome.signal is None
    assert saved_steps(tmp_path) == [6, 7]


def test_logged_metrics_are_means_over_the_passes_since_the_last_log(tmp_path):
    recorder = Recorder()
    plan = replace(PLAN, num_steps=4, accumulation_steps=2)
    scripted(tmp_path, plan, losses=[1, 2, 3, 4, 5, 6, 7, 8], recorder=recorder)
    assert [m["loss"] for _, split, m in recorder.lines if split == "train"] == [2.5, 6.5]
    assert all(m["learning_rate"] == 0.1 for _, split, m in recorder.lines if split == "train")


def test_batches_are_a_function_of_the_pass(tmp_path):
    """Each pass once, in order, and a resumed run goes on where the first one stopped."""
    plan, seen, asked = replace(PLAN, accumulation_steps=2, num_steps=3), [], []

    def passes(progress):
        checkpoints = Checkpoints(tmp_path / str(progress.step), "base")
        tiny.fit(
            empty_state(),
            {},
            plan,
            progress=progress,
            draw_at=lambda step: asked.append(step) or {"pass": np.int32(step)},
            train_steps=lambda state, frozen, draws: (
                state,
                seen.extend(int(draw["pass"]) for draw in draws) or measured([1.0] * len(draws)),
            ),
            validate=lambda state: {"accuracy": 0.0},
            checkpoints=checkpoints,
            metrics_log=Recorder(),
            bar=Recorder(),
            stop_requested=lambda: None,
        )
        checkpoints.close()
        return [seen.pop(0) for _ in range(len(seen))]

    assert passes(Progress()) == [0, 1, 2, 3, 4, 5]
    assert passes(Progress(step=2)) == [4, 5]
    assert passes(Progress(step=3)) == []


def test_early_stopping_waits_for_its_patience_and_keeps_the_best(tmp_path):
    recorder = Recorder()
    plan = replace(PLAN, num_steps=20, patience=2)
    outcome = scripted(tmp_path, plan, scores=[0.1, 0.5, 0.4, 0.5, 0.9], recorder=recorder)
    assert recorder.steps("validation") == [2, 4, 6, 8]  # 0.5 again is not better
    assert outcome.progress.best_step == 4
    assert outcome.progress.since_best == 2
    assert recorder.advanced[-1] == 8
    assert saved_steps(tmp_path) == [4, 8]


def test_a_run_that_stopped_early_stays_stopped_when_resumed(tmp_path):
    stopped = Progress(8, best_step=4, best_score=0.5, since_best=2)
    outcome = scripted(tmp_path, replace(PLAN, num_steps=20, patience=2), progress=stopped)
    assert outcome.progress == stopped
    assert int(outcome.state.micro_step) == 0


def test_smaller_is_better_for_a_loss(tmp_path):
    outcome = scripted(tmp_path, replace(PLAN, metric="perplexity"), scores=[3.0, 2.0, 2.5])
    assert outcome.progress.best_step == 4
    assert outcome.progress.best_score == -2.0


def test_an_undefined_metric_is_never_the_best(tmp_path):
    """The correlation of constant predictions is NaN, at the start above all; nothing compares to it."""
    outcome = scripted(tmp_path, replace(PLAN, metric="pearson"), scores=[math.nan, 0.2, math.nan])
    assert outcome.progress.best_step == 4
    assert outcome.progress.best_score == 0.2


@pytest.mark.parametrize("schedule", [OneShot(0.5, step=5), Cubic(0.5, begin_step=1, end_step=5, every_steps=1)])
def test_only_an_adapter_that_is_pruned_to_the_end_may_be_best(tmp_path, schedule):
    """Nor is patience lost before: every validation of a denser adapter is without consequence."""
    recorder = Recorder()
    plan = replace(PLAN, num_steps=8, eval_every_steps=1, pruning=schedule, patience=3)
    scores = [0.9, 0.9, 0.9, 0.9, 0.2, 0.3, 0.1, 0.1]
    outcome = scripted(tmp_path, plan, scores=scores, recorder=recorder)
    assert outcome.progress.best_step == 6
    assert outcome.progress.best_score == 0.3
    assert [int(mask.sum()) for mask in outcome.state.masks["layer"].values()] == [4, 2]
    np.testing.assert_array_equal(outcome.state.adapters["sites"]["layer"]["a"], [[0, 0, 0, 0, 5, 6, 7, 8]])
    sparsity = {step: metrics["sparsity"] for step, split, metrics in recorder.lines if split == "train"}
    assert sparsity[8] == 0.5
    assert saved_steps(tmp_path) == [6, 8]


@Criterion
def smallest(sites, **context):
    """Another criterion than magnitude: its opposite."""
    return jax.tree.map(lambda leaf: -jnp.abs(leaf), sites)


def test_the_plan_s_criterion_chooses_what_is_pruned(tmp_path):
    plan = replace(PLAN, num_steps=2, eval_every_steps=2, pruning=OneShot(0.5, step=1), pruner=Pruner(smallest))
    outcome = scripted(tmp_path, plan, scores=[0.1])
    np.testing.assert_array_equal(outcome.state.adapters["sites"]["layer"]["a"], [[1, 2, 3, 4, 0, 0, 0, 0]])


def test_only_the_parameters_that_the_plan_names_are_pruned(tmp_path):
    plan = replace(
        PLAN, num_steps=2, eval_every_steps=2, pruning=OneShot(0.5, step=1), pruner=Pruner(selection=Selection(("b",)))
    )
    outcome = scripted(tmp_path, plan, scores=[0.1])
    assert [int(mask.sum()) for mask in outcome.state.masks["layer"].values()] == [8, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("position", "step"), [(0, 1), (5, 2), (6, 3), (13, 5)])
def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, bad, position, step):
    """Three micro-steps a step: micro-step 5 (from 0) belongs to step 2. Nothing is saved from that step on."""
    losses = [1.0] * 18
    losses[position] = bad
    plan = replace(PLAN, accumulation_steps=3, log_every_steps=4)
    with pytest.raises(InputError, match=f"the loss is {bad} at step {step}; .*learning_rate"):
        scripted(tmp_path, plan, losses=losses)
    assert all(saved < step for saved in saved_steps(tmp_path))


@pytest.mark.parametrize("stop_after", [1, 2, 3, 6])
def test_a_stop_request_saves_and_returns(tmp_path, stop_after):
    recorder = Recorder()
    outcome = scripted(tmp_path, PLAN, scores=[0.5, 0.6, 0.7], stop_after=stop_after, recorder=recorder)
    assert outcome.signal == 15
    assert outcome.progress.step == recorder.advanced[-1] == stop_after
    assert saved_steps(tmp_path)[-1] == stop_after
    assert stop_after in recorder.steps("train")  # the last losses are logged
    assert recorder.steps("validation") == list(range(2, stop_after + 1, 2))


@pytest.mark.parametrize("log_every", [1, 4])
def test_the_start_is_validated_once_and_the_first_interval_does_not_wait_for_it(tmp_path, log_every):
    recorder, seen = Recorder(), []
    plan = replace(PLAN, num_steps=6, log_every_steps=log_every, eval_every_steps=2)
    start = {"accuracy": 0.25}
    scripted(
        tmp_path, plan, recorder=recorder, validate_start=lambda: seen.append(list(recorder.advanced)) or dict(start)
    )
    assert [advanced[-1] for advanced in seen] == [1 if log_every == 1 else 2]
    assert recorder.steps("validation") == [0, 2, 4, 6]
    assert recorder.lines[1 if log_every == 1 else 0] == (0, "validation", start)
    scripted(tmp_path / "stopped", plan, validate_start=pytest.fail, stop_after=1)  # which would keep a signal waiting


def test_speed_counts_the_time_of_all_its_tokens(tmp_path, monkeypatch):
    """A pass takes 1 s and a validation 100 s; 32 tokens a pass are 32 a second, wherever validations fall."""
    clock = Clock()
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock.now)
    plan, recorder = replace(PLAN, num_steps=8, log_every_steps=4, eval_every_steps=3), Recorder()
    checkpoints = Checkpoints(tmp_path, "base")

    def train_steps(state, frozen, draws):
        clock.now += len(draws)
        return state, measured([1.0] * len(draws))

    def validate(state):
        clock.now += 100
        return {"accuracy": 0.0}

    outcome = tiny.fit(
        empty_state(),
        {},
        plan,
        progress=Progress(seconds=50),
        draw_at=lambda step: DRAW,
        train_steps=train_steps,
        validate=validate,
        checkpoints=checkpoints,
        metrics_log=recorder,
        bar=recorder,
        stop_requested=lambda: None,
        validate_start=lambda: validate(None),
    )
    checkpoints.close()
    speeds = [metrics["tokens_per_second"] for _, split, metrics in recorder.lines if split == "train"]
    assert speeds == [32, 32]
    assert outcome.tokens_per_second == 32
    assert outcome.progress.seconds == 50 + 8 + 3 * 100  # the last validation comes after the clock was read


class Clock:
    now = 0.0


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    """Bit for bit, over four devices: dropout, accumulation, clipping, decay, and pruning before and after the break."""
    parallel, traces = data_parallel(), Counter()
    pruning = Cubic(0.6, begin_step=1, end_step=5, every_steps=2)
    plan = replace(PLAN, accumulation_steps=2, pruning=pruning, eval_every_steps=3, micro_steps_per_dispatch=3)
    options = {"pruned": True, "accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    objective, optimizer, frozen, _ = tiny.training(tiny.Toy(), Lora(rank=4, dropout=0.2), **options)
    step, frozen = make_train_step(objective, optimizer, traces), parallel.replicate(frozen)

    def fresh():
        return parallel.replicate(tiny.training(tiny.Toy(), Lora(rank=4, dropout=0.2), **options)[3])

    def run(directory, state, progress, num_steps):
        checkpoints = Checkpoints(directory, "base")
        if progress.step:
            state, progress = checkpoints.restore(state, progress.step)
        recorder = Recorder()
        outcome = tiny.fit(
            state,
            frozen,
            replace(plan, num_steps=num_steps),
            progress=progress,
            **tiny.fed(step, parallel, most=3),
            validate=lambda state: {"accuracy": float(jnp.abs(state.adapters["sites"]["up"]["b"]).sum())},
            checkpoints=checkpoints,
            metrics_log=recorder,
            bar=recorder,
            stop_requested=lambda: None,
        )
        checkpoints.close()
        return outcome, [(at, split, strip(metrics)) for at, split, metrics in recorder.lines if at > 3]

    def strip(metrics):
        return {key: value for key, value in metrics.items() if key != "tokens_per_second"}

    straight, lines = run(tmp_path / "straight", fresh(), Progress(), 6)
    run(tmp_path / "broken", fresh(), Progress(), 3)
    resumed, resumed_lines = run(tmp_path / "broken", fresh(), Progress(step=3), 6)
    chex.assert_trees_all_equal(tiny.snapshot(resumed.state), tiny.snapshot(straight.state))
    assert replace(resumed.progress, seconds=0) == replace(straight.progress, seconds=0)
    assert resumed_lines[-1] == lines[-1]
    # The log interval that was cut in two differs in its mean alone.
    assert [line[:2] for line in resumed_lines] == [line[:2] for line in lines]
    assert traces == {(4, tiny.SEQUENCE): 1}
