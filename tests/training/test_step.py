"""The compiled steps on whole models, and what must hold of them whatever the model: on a toy."""

import functools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType

from jaxpeft.adapters import Hira, Lora
from jaxpeft.errors import InputError
from jaxpeft.models.build import Quantization
from jaxpeft.pruning.masks import apply_masks, keep_counts
from jaxpeft.training.sharding import DataParallel, data_parallel
from jaxpeft.training.step import init_state, make_train_step, prune_step

LORA = Lora(rank=4, alpha=8.0, dropout=0.1)
MODELS = {
    "bert-lora-classification": (
        ("bert", "classification", {"config": {"num_hidden_layers": 1}}),
        LORA,
        {"fully_trained": ("classifier/kernel", "classifier/bias")},
    ),
    "distilbert-hira-nf4-pruned": (
        ("distilbert", "masked-lm", {"config": {"n_layers": 1}, "quantization": Quantization()}),
        Hira(rank=4),
        {"pruned": True},
    ),
}


@functools.cache
def toy(**options):
    """`(objective, optimizer, frozen, step)` of a toy: one compiled step for all tests that ask for the same."""
    objective, optimizer, frozen, _ = tiny.training(tiny.Toy(), LORA, **options)
    return objective, optimizer, frozen, make_train_step(objective, optimizer)


def toy_state(seed=7, **options):
    adapters = tiny.adapted(tiny.Toy(), LORA, nonzero=False)[1]
    return init_state(adapters, toy(**options)[1], jax.random.key(seed), pruned=False)


def toy_run(steps, *, seed=7, batches=tiny.batch, **options):
    """The adapters' values and the metrics after each of `steps` updates of a toy."""
    _, _, frozen, step = toy(**options)
    state = toy_state(seed, **options)
    for i in range(steps):
        state, metrics = step(state, frozen, batches(seed=i))
        yield tiny.snapshot(state.adapters), metrics


@pytest.mark.parametrize("name", MODELS)
def test_only_the_adapters_change(tiny_models, name):
    (kind, task, options), method, setup = MODELS[name]
    model = tiny_models(kind, task, **options)
    objective, optimizer, frozen, state = tiny.training(model, method, **setup)
    before, base, params = tiny.snapshot(state), tiny.snapshot(frozen), tiny.snapshot(model.params)
    traces: Counter = Counter()
    step = make_train_step(objective, optimizer, traces)
    for i in range(3):
        if setup.get("pruned") and i == 2:
            state = prune_step(state, keep_counts(state.adapters["sites"], 0.5))
        state, _ = step(state, frozen, tiny.batch(task=task, seed=i))
    after = tiny.snapshot(state)
    chex.assert_trees_all_equal(tiny.snapshot(frozen), base)
    chex.assert_trees_all_equal(tiny.snapshot(model.params), params)  # donation took nothing of the caller's
    chex.assert_trees_all_equal(after.rng, before.rng)
    chex.assert_trees_all_equal_structs(after, before)
    chex.assert_tree_all_finite(after.adapters)
    changed = jax.tree.map(lambda new, old: bool((new != old).any()), after.adapters, before.adapters)
    assert all(jax.tree.leaves(changed)), changed
    assert int(after.micro_step) == 3
    assert traces == {(4, tiny.SEQUENCE): 1}
    if setup.get("pruned"):
        assert {keep.sum() / keep.size for keep in jax.tree.leaves(after.masks)} == {0.5}
        chex.assert_trees_all_equal(apply_masks(after.adapters["sites"], after.masks), after.adapters["sites"])


def test_training_learns_one_batch():
    batch = tiny.batch()
    *_, (_, metrics) = toy_run(60, batches=lambda seed: batch)
    (_, start) = next(toy_run(1, batches=lambda seed: batch))
    assert float(metrics["loss"]) < 0.2 * float(start["loss"])


def test_one_trace_a_shape_and_one_program_across_pruning(caplog):
    """Counted as Python's traces, and as what XLA really compiled: masks are arguments, and keep their placement."""
    parallel, traces = data_parallel(), Counter()
    objective, optimizer, frozen, state = tiny.training(tiny.Toy(), LORA, pruned=True)
    state, frozen = parallel.replicate(state), parallel.replicate(frozen)
    step = make_train_step(objective, optimizer, traces)
    with jax.log_compiles():
        for i in range(6):
            state, _ = step(state, frozen, parallel.shard(tiny.batch(seed=i)))
            if i in (1, 3):
                state = prune_step(state, keep_counts(state.adapters["sites"], 0.25 * i))
        assert traces == {(4, tiny.SEQUENCE): 1}
        assert count_compiled(caplog, "train_step") == 1
        assert count_compiled(caplog, "prune_step") == 1
        state, _ = step(state, frozen, parallel.shard(tiny.batch(length=8)))
    assert traces == {(4, tiny.SEQUENCE): 1, (4, 8): 1}
    assert count_compiled(caplog, "train_step") == 2


def count_compiled(caplog, name):
    return sum(f"Finished XLA compilation of jit({name})" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("count", [1, 4])
def test_the_state_is_donated_and_what_it_was_made_of_is_not(count):
    """On one device too, where placing an array on the mesh shares its memory."""
    _, optimizer, frozen, _ = toy()
    adapters = {"sites": tiny.adapted(tiny.Toy(), LORA)[1]["sites"], "modules": {"extra": {"bias": jnp.ones(3)}}}
    rng, parallel = jax.random.key(0), mesh_of(count)
    state = parallel.replicate(init_state(adapters, optimizer, rng, pruned=True))
    placed = parallel.replicate(frozen)
    toy()[-1](state, placed, parallel.shard(tiny.batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.adapters, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapters, rng, frozen, placed)))


def mesh_of(count):
    return DataParallel(jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]))


def test_the_same_seed_gives_the_same_run_and_another_seed_another():
    one, two, other = ([adapters for adapters, _ in toy_run(4, seed=seed)] for seed in (7, 7, 8))
    chex.assert_trees_all_equal(one, two)
    assert (one[-1]["sites"]["up"]["a"] != other[-1]["sites"]["up"]["a"]).any()


def test_every_pass_draws_its_own_dropout():
    """Two passes over one batch at learning rate 0: the losses differ by their dropout alone."""
    batch = tiny.batch()
    first_loss, second_loss = (float(m["loss"]) for _, m in toy_run(2, batches=lambda seed: batch, learning_rate=0.0))
    assert first_loss != second_loss


def test_two_half_batches_accumulated_are_one_full_batch():
    """Of equal weight, without dropout, from the loss to the update."""
    toy, method = tiny.Toy(), Lora(rank=4)
    toy.module = tiny.Toy.Module(dropout=0.0)
    full = tiny.batch(8)
    halves = [{key: value[i : i + 4] for key, value in full.items()} for i in (0, 4)]
    options = {"weight_decay": 0.1, "max_grad_norm": 0.1}
    objective, optimizer, frozen, state = tiny.training(toy, method, **options)
    expected, metrics = make_train_step(objective, optimizer)(state, frozen, full)
    objective, optimizer, frozen, state = tiny.training(toy, method, **options, accumulation_steps=2)
    step, losses = make_train_step(objective, optimizer), []
    for half in halves:
        state, half_metrics = step(state, frozen, half)
        losses.append(float(half_metrics["loss"]))
    assert np.mean(losses) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    chex.assert_trees_all_close(state.adapters, expected.adapters, rtol=1e-5, atol=1e-6)
    assert int(state.micro_step) == 2


def test_a_batch_without_weight_trains_nothing_and_is_finite():
    _, _, frozen, step = toy()
    state, batch = toy_state(), tiny.batch()
    before = tiny.snapshot(state.adapters)
    state, metrics = step(state, frozen, {**batch, "weights": batch["weights"] * 0})
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0
    chex.assert_trees_all_equal(tiny.snapshot(state.adapters), before)


def test_four_devices_train_as_one():
    """The same adapters after three updates, dropout included: each row's draw does not depend on its device."""
    _, _, frozen, step = toy()
    results = []
    for parallel in (mesh_of(1), mesh_of(4)):
        state, placed = parallel.replicate(toy_state()), parallel.replicate(frozen)
        for i in range(3):
            batch = parallel.shard(tiny.batch(8, seed=i))
            assert len(batch["input_ids"].sharding.device_set) == parallel.mesh.size
            state, metrics = step(state, placed, batch)
        results.append(tiny.snapshot((state.adapters, metrics)))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)


def test_a_batch_that_cannot_be_split_is_refused():
    parallel = data_parallel()
    parallel.check(8, "training.batch_size")
    with pytest.raises(InputError, match=r"training\.batch_size 6 cannot be split over 4 devices; 4 can"):
        parallel.check(6, "training.batch_size")
    with pytest.raises(InputError, match=r"training\.batch_size 3 cannot be split over 4 devices; 4 can"):
        parallel.check(3, "training.batch_size")
