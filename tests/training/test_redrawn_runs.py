"""Sparse updates whose entries are redrawn: the entries that RigL and SET take up, and runs that are resumed."""

from collections import Counter
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_loop import Recorder
from tiers import slow, slow_but

from jaxpeft.adapters import Shira, SuperTuning
from jaxpeft.adapters.sparse_indices import places
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.quantization import dequantize, is_quantized
from jaxpeft.training import loop
from jaxpeft.training.checkpoint import Checkpoints, Progress
from jaxpeft.training.objective import Objective
from jaxpeft.training.plan import Plan
from jaxpeft.training.redraw import dense_gradients, make_redrawing
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import init_state, make_train_step
from jaxpeft.trees import constants_of, leaf_paths, without_shared

METHODS = {"shira": Shira(rank=2), "supra": SuperTuning(sparsity=0.8, rank=2, dropout=0.1)}
SIZES = {"up": 16 * 24, "down": 24 * tiny.VOCABULARY}

pytestmark = pytest.mark.xdist_group("fit-together")


def toy(*, quantized=False, dropout=0.0):
    model = tiny.Toy(quantized=quantized)
    model.module = tiny.Toy.Module(dropout=dropout)
    return model


class Trained:
    """A sparse update with values that are not zero, in the middle of a run."""

    def __init__(self, model, method, *, seed=7, **options):
        self.model, self.method = model, method
        self.objective, self.optimizer, self.frozen, _ = tiny.training(model, method, **options)
        adapters = tiny.adapted(model, method)[1]
        redrawn = constants_of(self.frozen)
        self.state = init_state(adapters, self.optimizer, jax.random.key(seed), pruned=False, redrawn=redrawn)
        self.pipeline = tiny.whole_batches(data_parallel())

    def redrawn(self, growth, *, step=2, share=0.5, size=2, state=None):
        """The state after a redraw of a `share` of the entries; `size` micro-steps make a step."""
        schedule = Redraw(growth, 2 * step, step, 2 * share)  # half of its way: half of the share
        redraw = make_redrawing(self.objective, self.frozen, self.pipeline, schedule, accumulation_steps=size)
        return redraw(state or self.state, step)

    def logits(self, state):
        masks, batch = state.masks, tiny.batch()
        return jax.jit(self.objective.logits)(self.frozen, state.adapters, masks, batch)

    def dense(self, micro_steps):
        """|The sum of the dense gradients| of the merged model, by layer, in the order of torch's layout."""
        plain = Objective(self.model, None, self.objective.task)

        def loss(params):
            batches = [tiny.batch(seed=i) for i in micro_steps]
            return sum(tiny.mean_loss(plain, params, {"sites": {}, "modules": {}}, {}, batch) for batch in batches)

        merged = tiny.merge_pure(self.frozen, self.state.adapters, self.method)
        grads = jax.jit(jax.grad(loss))(merged)
        return {path: np.abs(np.asarray(grads[path]["kernel"]).T.reshape(-1)) for path in SIZES}


@pytest.mark.parametrize(
    ("name", "quantized"),
    [pytest.param("shira", False, marks=slow), ("shira", True), pytest.param("supra", False, marks=slow)],
)
def test_rigl_takes_up_the_largest_dense_gradients(name, quantized):
    """Those of the merged model, over the micro-steps of the step, on four devices."""
    method = METHODS[name] if name == "shira" else replace(METHODS[name], dropout=0.0)
    run = Trained(toy(quantized=quantized), method)
    after, dense = run.redrawn("gradient"), run.dense([2, 3])
    for path, scores in dense.items():
        old, new = (np.asarray(state.masks[path]["indices"]) for state in (run.state, after))
        before, values = (np.asarray(state.adapters["sites"][path]["v"]) for state in (run.state, after))
        gone = np.argsort(np.abs(before))[: len(old) // 2]
        stays = np.delete(np.arange(len(old)), gone)
        assert len(new) == len(set(new)) == len(old)
        assert 0 <= new.min() <= new.max() < SIZES[path]
        np.testing.assert_array_equal(new[stays], old[stays])
        np.testing.assert_array_equal(values[stays], before[stays])
        np.testing.assert_array_equal(values[gone], 0)
        free = np.setdiff1d(np.arange(SIZES[path]), old[stays])
        expected = free[np.argsort(-scores[free], kind="stable")[: len(gone)]]
        # Of gradients that are equal to rounding either may come.
        threshold = scores[expected].min()
        assert scores[new[gone]].min() >= threshold * (1 - 1e-4)
        assert len(np.intersect1d(new[gone], expected)) >= len(gone) - 2


def test_taking_up_entries_changes_no_output():
    """Only giving entries up does: the logits after a redraw are those with their values set to zero."""
    run = Trained(toy(), METHODS["supra"])
    after = run.redrawn("random")
    values = {path: jnp.where(after.masks[path]["indices"] == own["indices"], after.adapters["sites"][path]["v"], 0)
              for path, own in run.state.masks.items()}  # fmt: skip
    sites = {path: {**own, "v": values[path]} for path, own in run.state.adapters["sites"].items()}
    silenced = replace(run.state, adapters={**run.state.adapters, "sites": sites})
    np.testing.assert_array_equal(run.logits(after), run.logits(silenced))
    assert (run.logits(after) != run.logits(run.state)).any()
    # Where all values to give up are zero already, nothing changes.
    again = run.redrawn("random", state=silenced)
    np.testing.assert_array_equal(run.logits(again), run.logits(silenced))
    assert (again.masks["up"]["indices"] != silenced.masks["up"]["indices"]).any()


def test_set_draws_by_the_run_s_key_and_the_step():
    run = Trained(toy(), METHODS["shira"])
    first = run.redrawn("random")
    chex.assert_trees_all_equal(run.redrawn("random").masks, first.masks)
    for other in (run.redrawn("random", step=4), Trained(toy(), METHODS["shira"], seed=8).redrawn("random")):
        assert (other.masks["up"]["indices"] != first.masks["up"]["indices"]).any()
    for path, size in SIZES.items():
        indices = np.asarray(first.masks[path]["indices"])
        assert len(set(indices.tolist())) == len(indices)
        assert 0 <= indices.min() <= indices.max() < size


@pytest.mark.parametrize("size", slow_but([1, 2], 2))
def test_the_moments_of_new_entries_start_anew(size):
    run = Trained(toy(), METHODS["supra"], accumulation_steps=size)
    step, state = make_train_step(run.objective, run.optimizer), run.state
    for i in range(2 * size):
        state, _ = step(state, run.frozen, tiny.batch(seed=i))
    after = run.redrawn("gradient", size=size, state=state)
    (old,), (new,) = (
        [leaf for leaf in jax.tree.leaves(each.opt_state, is_leaf=is_adam) if is_adam(leaf)] for each in (state, after)
    )
    assert int(new.count) == int(old.count) == 2
    for path in SIZES:
        values = np.asarray(state.adapters["sites"][path]["v"])
        gone = np.argsort(np.abs(values))[: values.size // 2]
        stays = np.delete(np.arange(values.size), gone)
        for moments, before in ((new.mu, old.mu), (new.nu, old.nu)):
            own, was = (np.asarray(each["sites"][path]["v"]) for each in (moments, before))
            assert was[gone].any()
            np.testing.assert_array_equal(own[gone], 0)
            np.testing.assert_array_equal(own[stays], was[stays])
            np.testing.assert_array_equal(moments["sites"][path]["a"], before["sites"][path]["a"])
    assert int(after.micro_step) == int(state.micro_step)


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


@pytest.mark.parametrize("quantized", slow_but([False, True], True))
def test_the_gradient_at_entries_that_train_is_that_of_their_values(quantized):
    """With the dropout of the training step."""
    run = Trained(toy(quantized=quantized, dropout=0.3), METHODS["supra"])
    batch, number = tiny.batch(seed=3), jnp.int32(3)
    dense = jax.jit(partial(dense_gradients, run.objective))(run.state, run.frozen, batch, number)
    rng = jax.random.fold_in(run.state.rng, number)

    def loss(adapters, rng):
        return tiny.mean_loss(run.objective, run.frozen, adapters, run.state.masks, batch, rng)

    own = jax.jit(jax.grad(loss))(run.state.adapters, rng)["sites"]
    leaves = leaf_paths(without_shared(run.frozen)[0])
    for path, gradient in dense.items():
        assert gradient.shape == leaves[f"{path}/kernel"].shape
        assert gradient.dtype == jnp.float32
        found = gradient[places(run.state.masks[path]["indices"], gradient.shape[0])]
        np.testing.assert_allclose(found, own[path]["v"], rtol=1e-5, atol=1e-6)


def test_the_step_keeps_no_dense_gradient():
    """Nothing of a kernel's size comes out of a step, and redrawn indices cost no operations that fixed ones do not."""
    run = Trained(toy(), METHODS["shira"])
    step, batch = make_train_step(run.objective, run.optimizer), tiny.batch()
    fixed = replace(run.state, masks={})
    lowered = [step.lower(state, run.frozen, batch) for state in (run.state, fixed)]
    after = lowered[0].out_info[0]
    chex.assert_trees_all_equal_shapes_and_dtypes(after, jax.eval_shape(lambda: run.state))
    assert not [leaf.shape for leaf in jax.tree.leaves(after) if leaf.size in SIZES.values()]
    number = sum(leaf.size for leaf in jax.tree.leaves(run.state.masks))
    assert sum(leaf.size for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim) == 2 * number
    flops = [each.compile().cost_analysis()["flops"] for each in lowered]
    assert flops[0] == flops[1]


PLAN = Plan(
    num_steps=8,
    accumulation_steps=2,
    log_every_steps=2,
    eval_every_steps=4,
    metric="accuracy",
    learning_rate=lambda step: 1e-2,
    micro_steps_per_dispatch=3,
)
RUNS = {"rigl": Redraw("gradient", 8, 2, 0.5), "set": Redraw("random", 8, 2, 0.5)}


class Changes:
    """A log of masks that remembers."""

    def __init__(self):
        self.lines = []

    def write(self, step, masks, before):
        self.lines.append((step, tiny.snapshot(masks), tiny.snapshot(before)))


class Run(Trained):
    """Runs that share a compiled step; each has checkpoints of its own."""

    def __init__(self, schedule):
        options = {"accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
        super().__init__(toy(quantized=True, dropout=0.1), METHODS["shira"], **options)
        self.plan, self.parallel, self.traces = replace(PLAN, pruning=schedule), data_parallel(), Counter()
        self.frozen = self.parallel.replicate(self.frozen)
        self.step = make_train_step(self.objective, self.optimizer, self.traces)
        self.redraw = make_redrawing(self.objective, self.frozen, self.pipeline, schedule, accumulation_steps=2)

    def fit(self, directory, *, stop_after=None, progress=None):
        state, checkpoints = self.parallel.replicate(tiny.copied(self.state)), Checkpoints(directory, "base")
        recorder, changes = Recorder(), Changes()
        if progress:
            state, progress = checkpoints.restore(state, progress)
        run = loop.RunState(
            self.plan,
            progress or Progress(),
            state,
            lambda state: {"accuracy": 0.0},
            checkpoints,
            recorder,
            sparsity_log=changes,
            redraw=self.redraw,
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
        return outcome, recorder, changes


@pytest.mark.parametrize("name", slow_but(RUNS, "rigl"))
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, name):
    """Bit for bit, on a quantised base over four devices, with accumulation, clipping, decay and dropout; no step is compiled twice."""
    run = Run(RUNS[name])
    whole, recorder, changes = run.fit(tmp_path / "whole")
    stopped, _, first = run.fit(tmp_path / "parts", stop_after=4)
    assert stopped.progress.step == 4
    resumed, _, second = run.fit(tmp_path / "parts", progress=4)
    chex.assert_trees_all_equal(tiny.snapshot(resumed.state), tiny.snapshot(whole.state))
    assert [step for step, *_ in first.lines + second.lines] == [2, 4, 6]
    chex.assert_trees_all_equal(first.lines + second.lines, changes.lines)
    assert run.traces == {(4, tiny.SEQUENCE): 1}
    rows = {step: metrics for step, split, metrics in recorder.lines if split == "pruning"}
    assert [sorted(row) for row in rows.values()] == [["mask_churn"]] * 3
    assert 0 < rows[6]["mask_churn"] < rows[2]["mask_churn"] <= RUNS[name].share_at(2)
    assert not any("sparsity" in metrics for _, split, metrics in recorder.lines if split == "train")
    # What the run ends with is what it was given to redraw, at other entries.
    for path, own in whole.state.masks.items():
        indices = np.asarray(own["indices"])
        assert len(set(indices.tolist())) == len(indices) == run.state.masks[path]["indices"].size
        assert (indices != np.asarray(run.state.masks[path]["indices"])).any()
    kernels = leaf_paths(without_shared(run.frozen)[0])
    assert any(map(is_quantized, kernels.values()))
    merged = tiny.merge_pure(run.frozen, whole.state.adapters, run.method, whole.state.masks)
    for path in SIZES:
        moved = np.asarray(merged[path]["kernel"] != dequantize(kernels[f"{path}/kernel"]))
        assert moved.sum() <= whole.state.masks[path]["indices"].size
