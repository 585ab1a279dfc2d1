"""Draws made ahead, batches assembled in the program, several passes a dispatch: nothing of it changes what is computed."""

from collections import Counter
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.array import ArrayImpl

from jaxpeft.adapters import Lora
from jaxpeft.data import ClassificationData, Encoded, MaskedLMData, PackedData
from jaxpeft.preflight.collectives import traffic
from jaxpeft.training.checkpoint import Progress
from jaxpeft.training.input_pipeline import Prefetched, make_input_pipeline
from jaxpeft.training.plan import Plan
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import make_eval_step, make_train_step, make_train_steps
from jaxpeft.trees import size_bytes

LORA = Lora(rank=4, dropout=0.1)
PLAN = Plan(
    num_steps=12,
    accumulation_steps=1,
    log_every_steps=4,
    eval_every_steps=12,
    metric="accuracy",
    learning_rate=lambda step: 0.1,
    micro_steps_per_dispatch=3,
)


def masked_lm(rows=10):
    blocks = np.random.default_rng(0).integers(5, tiny.VOCABULARY, (rows, tiny.SEQUENCE)).astype(np.int32)
    blocks[:, 0], blocks[:, -1], blocks[3, 9:] = 1, 2, 0
    special = (0, 1, 2, 3, 4)
    return MaskedLMData(blocks, 4, 0.15, 3, 0, tiny.VOCABULARY, special, seed=5)


def classification(rows=22):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 15, rows)
    ids = rng.integers(5, tiny.VOCABULARY, lengths.sum()).astype(np.int32)
    encoded = Encoded(ids, ids % 2, np.cumsum([0, *lengths]), 0, 16, 0)
    return ClassificationData(encoded, rng.integers(0, 2, rows).astype(np.int32), 4, (8, 16), seed=5)


@pytest.mark.parametrize(
    "data",
    [masked_lm(), classification(), PackedData(classification(), 16, 4)],
    ids=["masked-lm", "classification", "packed"],
)
@pytest.mark.parametrize("limit_bytes", [2**20, 10], ids=["resident", "sent"])
def test_the_program_sees_the_batches_of_the_host(data, limit_bytes):
    """Over four devices, and whether the data is on them or does not fit; an incomplete batch too."""
    parallel = data_parallel()
    source = make_input_pipeline(data, parallel, limit_bytes=limit_bytes)
    assert bool(source.device_data) == (limit_bytes > 10)
    assemble = jax.jit(source.assemble)
    for step in range(2 * data.batches_per_epoch):
        draw = source.place({name: np.stack([leaf]) for name, leaf in source.draw_at(step).items()})
        found, expected = (
            assemble(source.device_data, {name: leaf[0] for name, leaf in draw.items()}),
            data.train_batch(step),
        )
        chex.assert_trees_all_equal(jax.device_get(dict(found)), expected)
        chex.assert_trees_all_equal_dtypes(jax.device_get(dict(found)), expected)
        assert all(not leaf.is_fully_replicated for leaf in found.values())


def test_passes_in_one_program_are_the_passes_one_by_one():
    objective, optimizer, frozen, state = tiny.training(tiny.Toy(), LORA)
    alone, traces = tiny.training(tiny.Toy(), LORA)[3], Counter()
    step = make_train_step(objective, optimizer, traces)
    steps, batches = make_train_steps(step, lambda device_data, batch: batch), [tiny.batch(seed=i) for i in range(5)]
    losses = []
    for chunk in (batches[:3], batches[3:]):
        filled = [*chunk, *chunk[-1:] * (3 - len(chunk))]
        draws = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
        state, metrics = steps(state, frozen, {}, draws, np.int32(len(chunk)))
        losses += metrics["loss"][: len(chunk)].tolist()
        assert metrics["tokens"][: len(chunk)].tolist() == [56] * len(chunk)
    assert traces == {(4, tiny.SEQUENCE): 1}  # one program for any number of passes
    expected = []
    for batch in batches:
        alone, metrics = step(alone, frozen, batch)
        expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    chex.assert_trees_all_close(tiny.snapshot(state), tiny.snapshot(alone), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.slow
@pytest.mark.parametrize("task", ["masked-lm", "classification"])
def test_nothing_but_gradients_crosses_the_devices(tiny_models, task):
    """Of a dispatch of three passes, its batches assembled on four devices: read from the compiled program."""
    model, parallel = tiny_models("bert", task), data_parallel()
    data, whole = masked_lm(), ()
    if task == "classification":
        data, whole = classification(), ("classifier/kernel", "classifier/bias")
    objective, optimizer, frozen, state = tiny.training(model, LORA, fully_trained=whole)
    state, frozen = parallel.replicate((state, frozen))
    source = make_input_pipeline(data, parallel)
    draws = source.place({name: np.stack([leaf] * 3) for name, leaf in source.draw_at(0).items()})
    steps = make_train_steps(make_train_step(objective, optimizer), source.assemble)
    compiled = steps.lower(state, frozen, source.device_data, draws, np.int32(3)).compile()
    sent = traffic(compiled.as_text())
    assert 0 < sent.array_bytes <= size_bytes(state.adapters)
    assert sent.scalar_bytes <= 16  # the loss, its weight, the tokens


class Quiet:
    """A log, a bar and checkpoints of which nothing is kept but how much the host has read when."""

    def __init__(self):
        self.reads, self.at = 0, []

    def write(self, step, split, metrics):
        self.at.append((step, split, self.reads))

    def advance(self, step):
        self.at.append((step, "dispatched", self.reads))

    def show(self, step, **figures):
        pass

    def save(self, state, progress):
        pass


def train(plan, quiet, source, step, state, frozen):
    return tiny.fit(
        state,
        frozen,
        plan,
        progress=Progress(),
        draw_at=source.draw_at,
        train_steps=source.train_steps(step, plan.micro_steps_per_dispatch),
        validate=lambda state: {"accuracy": 0.5},
        checkpoints=quiet,
        metrics_log=quiet,
        bar=quiet,
        stop_requested=lambda: None,
    )


@pytest.mark.parametrize("pruned", [False, True])
def test_the_host_reads_nothing_between_log_points(monkeypatch, pruned):
    quiet, read = Quiet(), ArrayImpl._value.fget

    def value(array):
        quiet.reads += 1
        return read(array)

    parallel, data = data_parallel(), masked_lm()
    objective, optimizer, frozen, state = tiny.training(tiny.Toy(), LORA, pruned=pruned)
    state, frozen = parallel.replicate((state, frozen))
    monkeypatch.setattr(ArrayImpl, "_value", property(value))
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    train(PLAN, quiet, make_input_pipeline(data, parallel), make_train_step(objective, optimizer), state, frozen)
    reads = {kind: [count for _, name, count in quiet.at if name == kind] for kind in ("dispatched", "train")}
    assert [step for step, name, _ in quiet.at if name == "dispatched"] == [3, 4, 7, 8, 11, 12]
    assert all(
        before == after for before, after in zip(reads["dispatched"][::2], reads["dispatched"][1::2], strict=True)
    )
    assert reads["dispatched"][0] == 0 < reads["train"][0]
    assert reads["dispatched"][2] == reads["train"][0]
    assert len(waited) == 3  # of an interval's two dispatches for the first alone, when the second is queued


@pytest.mark.slow
def test_one_trace_a_bucket_for_a_whole_run(tiny_models):
    """Five epochs of rows of many lengths, two buckets, dispatches of one to three passes: two programs."""
    model = tiny_models("bert", "classification", config={"num_hidden_layers": 1})
    parallel, data, traces = data_parallel(), classification(), Counter()
    objective, optimizer, frozen, state = tiny.training(
        model, LORA, fully_trained=("classifier/kernel", "classifier/bias")
    )
    state, frozen = parallel.replicate((state, frozen))
    step = make_train_step(objective, optimizer, traces)
    plan = replace(PLAN, num_steps=5 * data.batches_per_epoch, log_every_steps=7)
    outcome = train(plan, Quiet(), make_input_pipeline(data, parallel), step, state, frozen)
    assert int(outcome.state.micro_step) == plan.num_steps
    assert traces == dict.fromkeys([(4, 8), (4, 16)], 1)


def test_no_more_micro_steps_at_once_than_take_their_time(monkeypatch):
    """A pass takes 2 s; 5 s are allowed: one at a time until that is known, then two."""
    clock, quiet, chunks = {"now": 0.0}, Quiet(), []
    monkeypatch.setattr("jaxpeft.training.loop.time.monotonic", lambda: clock["now"])

    def train_steps(state, frozen, draws):
        clock["now"] += 2 * len(draws)
        chunks.append(len(draws))
        ones = jnp.ones(len(draws))
        return state, {"loss": ones, "tokens": ones}

    class State:
        masks = ()

    plan = replace(PLAN, seconds_per_dispatch=5.0, num_steps=8)
    tiny.fit(
        State(),
        {},
        plan,
        progress=Progress(),
        draw_at=lambda step: {"rows": np.zeros(1)},
        train_steps=train_steps,
        validate=lambda state: {"accuracy": 0.5},
        checkpoints=quiet,
        metrics_log=quiet,
        bar=quiet,
        stop_requested=lambda: None,
    )
    assert chunks == [1, 1, 1, 1, 2, 2]


def test_draws_come_in_order_as_far_as_one_program_takes_them():
    made = []

    def draw_at(number):
        made.append(number)
        return {"rows": np.full(4 if number < 5 else 2, number)}

    with Prefetched(draw_at, range(2, 9), depth=3) as draws:
        assert [int(draw["rows"][0]) for draw in draws.take(2)] == [2, 3]
        assert [int(draw["rows"][0]) for draw in draws.take(9)] == [4]  # then the shape changes
        assert [int(draw["rows"][0]) for draw in draws.take(9)] == [5, 6, 7, 8]
    assert made == [*range(2, 9)]


def test_an_error_in_a_draw_is_raised_where_it_is_taken():
    def draw_at(number):
        raise KeyError(number)

    with Prefetched(draw_at, range(3), depth=2) as draws, pytest.raises(KeyError, match="0"):
        draws.take(1)


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.slow
def test_what_is_frozen_below_the_first_adapter_costs_no_gradient(tiny_models):
    """Two more layers below the one that is adapted cost what they cost an evaluation, by XLA's count, and no more."""

    def flops(layers):
        model = tiny_models("bert", config={"num_hidden_layers": layers}, dropout=0.0)
        targets = [f"layer.{layers - 1}.attention.self.value"]
        objective, optimizer, frozen, state = tiny.training(model, Lora(rank=1), target_modules=targets)
        train = make_train_step(objective, optimizer).lower(state, frozen, tiny.batch())
        evaluate = make_eval_step(objective).lower(frozen, state.adapters, {}, tiny.batch())
        return [step.compile().cost_analysis()["flops"] for step in (train, evaluate)]

    (train_4, evaluate_4), (train_2, evaluate_2) = flops(4), flops(2)
    assert train_4 - train_2 == pytest.approx(evaluate_4 - evaluate_2, rel=0.02)
