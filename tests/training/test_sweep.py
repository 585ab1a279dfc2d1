"""Runs that train together are the runs that they would be alone: step by step, on tiny models and on a toy."""

from collections import Counter
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxpeft.adapters import AdaLora, Hira, Ia3, Lora, Shira
from jaxpeft.errors import InputError
from jaxpeft.pruning.masks import keep_counts, sparsity_of
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer, learning_rate_schedule
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import init_state, make_train_step, make_train_steps, prune_step
from jaxpeft.training.sweep import (
    Replicas,
    make_sweep_step,
    prune_replicas,
    settings_of,
    stack,
    sweep_input_pipeline,
    unstack,
)

STEPS, WARMUP, NORM = 8, 2, 1.0

pytestmark = pytest.mark.xdist_group("sweep")


def optimizer_at(rate):
    schedule = learning_rate_schedule(rate, STEPS, WARMUP, "linear")
    return build_optimizer(schedule, weight_decay=0.1, max_grad_norm=NORM)


class Alone:
    """A run by itself: its method, seed and learning rate, its own start and its own batches."""

    def __init__(self, model, method, *, seed=0, rate=1e-2, pruned=False):
        self.model, self.method, self.seed, self.rate = model, method, seed, rate
        self.frozen, adapters = tiny.adapted(model, method, nonzero=False, seed=seed)
        self.state = init_state(adapters, optimizer_at(rate), jax.random.key(seed), pruned=pruned)
        self.objective = Objective(model, method, MaskedLM())

    def batch(self, step):
        return tiny.batch(seed=100 * self.seed + step)

    def train(self, *, prune_after=None, sparsity=0.0):
        """`STEPS` updates; losses, and the last state."""
        step, state, losses = make_train_step(self.objective, optimizer_at(self.rate)), tiny.copied(self.state), []
        for i in range(STEPS):
            state, metrics = step(state, self.frozen, self.batch(i))
            losses.append(float(metrics["loss"]))
            if i == prune_after and sparsity:
                state = prune_step(state, keep_counts(state.adapters["sites"], sparsity))
        return losses, state


def together(runs, *, prune_after=None, sparsities=(), tokens_side_by_side=None):
    """The same of all `runs` in one program."""
    method, settings = settings_of([run.method for run in runs], [run.rate for run in runs])
    traces = Counter()
    objective = replace(runs[0].objective, method=method)
    step = make_sweep_step(objective, optimizer_at, traces, tokens_side_by_side=tokens_side_by_side)
    replicas, losses = Replicas(stack([run.state for run in runs]), settings), []
    for i in range(STEPS):
        batches = jax.tree.map(lambda *leaves: np.stack(leaves), *[run.batch(i) for run in runs])
        replicas, metrics = step(replicas, runs[0].frozen, batches)
        losses.append(np.asarray(metrics["loss"]))
        if i == prune_after:
            counts = [keep_counts(run.state.adapters["sites"], s) for run, s in zip(runs, sparsities, strict=True)]
            counts = jax.tree.map(lambda *each: jnp.asarray(each), *counts)
            replicas = replace(replicas, state=prune_replicas(replicas.state, counts, np.asarray(sparsities) > 0))
    assert traces == {(4, tiny.SEQUENCE): 1}
    return np.transpose(losses).tolist(), unstack(replicas.state, [run.state for run in runs]), replicas


def assert_as_alone(runs, **options):
    sparsities = options.get("sparsities") or [0.0] * len(runs)
    losses, states, replicas = together(runs, **options)
    for run, loss, state, sparsity in zip(runs, losses, states, sparsities, strict=True):
        expected, own = run.train(prune_after=options.get("prune_after"), sparsity=sparsity)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        chex.assert_trees_all_equal_shapes_and_dtypes(tiny.snapshot(state), tiny.snapshot(own))
        chex.assert_trees_all_close(state.adapters, own.adapters, atol=1e-5, rtol=1e-5)
        chex.assert_trees_all_close(state.opt_state, own.opt_state, atol=1e-5, rtol=1e-4)
        chex.assert_trees_all_equal(state.masks, own.masks)
        assert (jax.random.key_data(state.rng) == jax.random.key_data(own.rng)).all()
    return replicas


TOY = tiny.Toy()
"""Where the architecture does not matter: its steps compile in a tenth of the time."""
METHODS = {
    "lora": Lora(rank=4, alpha=8, dropout=0.1),
    "dora": Lora(rank=4, alpha=8, dropout=0.1, use_dora=True),
    "hira": Hira(rank=4),
    "shira": Shira(rank=1, random_seed=1),  # whose indices are the same for every seed
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_members_of_other_seeds_and_learning_rates(name, bert):
    method, model = METHODS[name], bert if name == "lora" else TOY
    assert_as_alone([Alone(model, method, seed=s, rate=r) for s, r in ((0, 1e-2), (1, 3e-3), (0, 1e-3))])


@pytest.mark.slow
def test_members_of_other_dropouts_alphas_and_ranks(bert):
    """Padded to the largest rank, and masked there; what is padded stays zero."""
    methods = [Lora(rank=2, alpha=8), Lora(rank=4, alpha=4, dropout=0.1), Lora(rank=4, alpha=16, dropout=0.7)]
    runs = [Alone(bert, method, seed=i) for i, method in enumerate(methods)]
    replicas = assert_as_alone(runs)
    assert set(replicas.settings) == {"learning_rate", "alpha", "dropout"}
    for site, masks in zip(replicas.state.adapters["sites"].values(), replicas.state.masks.values(), strict=True):
        assert site["a"].shape[-1] == site["b"].shape[-2] == 4
        assert not site["a"][0, :, 2:].any()
        assert not site["b"][0, 2:].any()
        assert (np.asarray(masks["a"]).sum((1, 2)) == [2 * 32, 4 * 32, 4 * 32]).all()


@pytest.mark.slow
def test_rank_stabilised_members_of_other_ranks():
    assert_as_alone([Alone(TOY, Lora(rank=r, alpha=8, use_rslora=True, use_dora=True), seed=r) for r in (1, 4)])


@pytest.mark.slow
def test_members_of_other_starts():
    starts = [True, "gaussian", "orthogonal"]
    assert_as_alone([Alone(TOY, Lora(rank=4, init_lora_weights=start)) for start in starts])


@pytest.mark.slow
def test_members_of_other_sparsities():
    """One is pruned to a half, one to a quarter, and one not at all; of different ranks, so that padding is not what is kept."""
    runs = [
        Alone(TOY, Lora(rank=4), seed=0, pruned=True),
        Alone(TOY, Lora(rank=2), seed=1, pruned=True),
        Alone(TOY, Lora(rank=4), seed=2),
    ]
    assert_as_alone(runs, prune_after=3, sparsities=[0.5, 0.75, 0.0])


@pytest.mark.slow
def test_members_one_after_the_other_in_the_program(bert):
    """As on a CPU, where their batches are large; and with no intermediate of all members."""
    methods = [Lora(rank=2, alpha=8, dropout=0.1), Lora(rank=4, alpha=4, dropout=0.1)]
    runs = [Alone(bert, method, seed=i, pruned=True) for i, method in enumerate(methods)]
    assert_as_alone(runs, prune_after=3, sparsities=[0.5, 0.0], tokens_side_by_side=1)
    method, settings = settings_of(methods, [1e-2] * 2)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *[run.batch(0) for run in runs])
    replicas = Replicas(stack([run.state for run in runs]), settings)
    texts = []
    for limit in (1, None):
        objective = replace(runs[0].objective, method=method)
        step = make_sweep_step(objective, optimizer_at, tokens_side_by_side=limit)
        texts.append(step.lower(replicas, runs[0].frozen, batches).as_text())
    hidden = f"tensor<2x4x{tiny.SEQUENCE}x32xf32>"
    assert [hidden in text for text in texts] == [False, True]


@pytest.mark.slow
def test_members_on_a_quantised_base_share_it():
    """In the compiled program there is one dequantised kernel of a layer, whatever number of members reads it."""
    methods = [Lora(rank=2, alpha=2), Lora(rank=2, alpha=8, dropout=0.2)]
    runs = [Alone(tiny.Toy(quantized=True), method, seed=i) for i, method in enumerate(methods)]
    assert_as_alone(runs)
    method, settings = settings_of([run.method for run in runs], [1e-2, 1e-2])
    step = make_sweep_step(Objective(runs[0].model, method, MaskedLM()), optimizer_at)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *[run.batch(0) for run in runs])
    text = step.lower(Replicas(stack([run.state for run in runs]), settings), runs[0].frozen, batches).as_text()
    assert "tensor<16x24xf32>" in text
    assert "tensor<2x16x24xf32>" not in text


def test_the_base_has_no_axis_of_members(bert):
    runs = [Alone(bert, Lora(rank=4), seed=i) for i in range(3)]
    method, settings = settings_of([run.method for run in runs], [1e-2] * 3)
    step = make_sweep_step(replace(runs[0].objective, method=method), optimizer_at)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *[run.batch(0) for run in runs])
    compiled = step.lower(Replicas(stack([run.state for run in runs]), settings), runs[0].frozen, batches).as_text()
    assert "tensor<3x32x48xf32>" not in compiled


def test_what_is_no_option_of_one_program_is_refused(bert):
    states = [Alone(bert, Lora(rank=4)).state, Alone(bert, Lora(rank=4, use_dora=True)).state]
    with pytest.raises(InputError, match="cannot train together"):
        stack(states)


def test_a_feed_of_members_gives_each_its_own_batches():
    class Rows:
        def __init__(self, seed):
            self.seed, self.device_data = seed, {"values": np.arange(40)}

        def draw(self, step):
            return {"rows": np.random.default_rng([self.seed, step]).integers(40, size=4)}

        def assemble(self, device_data, draw, xp):
            return {"input_ids": device_data["values"][draw["rows"]]}

    data, parallel = [Rows(0), Rows(1)], data_parallel()
    source = sweep_input_pipeline(data, parallel)
    steps = make_train_steps(
        jax.jit(lambda state, frozen, batch: (state, {"seen": batch["input_ids"]})), source.assemble
    )
    draws = [source.draw_at(i) for i in range(3)]
    stacked = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
    _, metrics = steps(jnp.zeros(()), {}, source.device_data, stacked, np.int32(3))
    expected = [[each.draw(i)["rows"] for each in data] for i in range(3)]
    np.testing.assert_array_equal(metrics["seen"], expected)


def test_a_member_that_is_not_finite_spoils_no_other():
    runs = [Alone(TOY, Lora(rank=4), seed=0), Alone(TOY, Lora(rank=4), seed=1, rate=1e30)]
    losses, states, _ = together(runs)
    assert not np.isfinite(losses[1]).all()
    np.testing.assert_allclose(losses[0], runs[0].train()[0], rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[0].adapters))


def test_equal_options_stay_numbers_of_the_program():
    """A rate of zero draws nothing: dropout is data only where it differs."""
    method, settings = settings_of([Lora(rank=2, alpha=4), Lora(rank=4, alpha=8)], [1e-3, 1e-2])
    assert method == Lora(rank=4, alpha=8)
    assert set(settings) == {"learning_rate"}
    none, settings = settings_of([None, None], [1e-3, 1e-2])
    assert none is None
    assert optax.tree.size(settings) == 2


def test_methods_without_a_rank_have_learning_rates_of_their_own():
    for method in (AdaLora(), Ia3(), None):
        found, settings = settings_of([method, method], [1e-3, 1e-2])
        assert found == method
        assert set(settings) == {"learning_rate"}


def test_masks_of_a_dense_member_count_as_none(bert):
    run = Alone(bert, Lora(rank=4))
    (state, other) = unstack(
        stack([run.state, Alone(bert, Lora(rank=2), pruned=True).state]),
        [run.state, Alone(bert, Lora(rank=2), pruned=True).state],
    )
    assert state.masks == {}
    assert sparsity_of(other.masks) == 0
