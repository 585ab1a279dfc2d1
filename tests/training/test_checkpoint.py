from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxpeft.adapters import Lora
from jaxpeft.errors import InputError
from jaxpeft.pruning.masks import keep_counts
from jaxpeft.quantization import quantize
from jaxpeft.training.checkpoint import Checkpoints, Progress, hash_base
from jaxpeft.training.dropout import GENERATORS, dropout_key
from jaxpeft.training.step import init_state, make_train_step, prune_step

METHOD = Lora(rank=4, dropout=0.1)


@pytest.fixture(scope="module")
def trained():
    """`(step, frozen, state, fresh)`: a pruned toy after three passes, in the middle of an accumulation."""
    objective, optimizer, frozen, state = tiny.training(tiny.Toy(), METHOD, pruned=True, accumulation_steps=2)
    step = make_train_step(objective, optimizer)
    for i in range(3):
        state, _ = step(state, frozen, tiny.batch(seed=i))
    state = prune_step(state, keep_counts(state.adapters["sites"], 0.5))

    def fresh(rank=4, pruned=True):
        adapters = tiny.adapted(tiny.Toy(), Lora(rank=rank), nonzero=False)[1]
        return init_state(adapters, optimizer, jax.random.key(99), pruned=pruned)

    return step, frozen, state, fresh


def saved(directory, state, *progresses, base_hash="base"):
    checkpoints = Checkpoints(directory, base_hash)
    for progress in progresses:
        checkpoints.save(state, progress)
    checkpoints.close()


def test_everything_comes_back_in_another_process(tmp_path, trained):
    """The typed key, the moments, a half-full accumulator, the masks and the progress."""
    _, frozen, state, fresh = trained
    progress = Progress(step=3, best_step=2, best_score=-1.5, since_best=1, seconds=12.5)
    saved(tmp_path, state, progress, base_hash=hash_base(frozen))
    checkpoints = Checkpoints(tmp_path, hash_base(frozen))
    assert checkpoints.latest == 3
    restored, came_back = checkpoints.restore(fresh(), 3)
    checkpoints.close()
    assert came_back == progress
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    chex.assert_trees_all_equal(tiny.snapshot(restored), tiny.snapshot(state))
    assert jax.dtypes.issubdtype(restored.rng.dtype, jax.dtypes.prng_key)
    assert int(restored.opt_state.mini_step) == 1


def test_a_step_that_consumes_the_state_does_not_reach_into_the_file(tmp_path, trained):
    """Files are written in the background, while the next passes are given the state's memory."""
    step, frozen, state, fresh = trained
    state = jax.tree.map(jnp.copy, state)
    expected, checkpoints = tiny.snapshot(state), Checkpoints(tmp_path, "base")
    checkpoints.save(state, Progress(step=1))
    for i in range(4):
        state, _ = step(state, frozen, tiny.batch(seed=i))
    restored, _ = checkpoints.restore(fresh(), 1)
    checkpoints.close()
    chex.assert_trees_all_equal(tiny.snapshot(restored), expected)


def test_the_newest_and_the_best_are_kept(tmp_path, trained):
    _, _, state, fresh = trained
    checkpoints = Checkpoints(tmp_path, "base")
    assert checkpoints.latest is None
    kept = []
    for update, best, score in [(1, None, None), (2, 2, 0.5), (3, 2, 0.5), (4, 2, 0.5), (5, 5, 0.9), (6, 5, 0.9)]:
        checkpoints.save(state.replace(micro_step=jnp.int32(update)), Progress(update, best, score))
        checkpoints.restore(fresh(), update)  # waits for the files
        kept.append(sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()))
    assert kept == [[1], [2], [2, 3], [2, 4], [5], [5, 6]]
    assert int(checkpoints.restore(fresh(), 5)[0].micro_step) == 5
    checkpoints.close()


def test_another_base_is_refused(tmp_path, trained):
    _, _, state, fresh = trained
    saved(tmp_path, state, Progress(step=1))
    with pytest.raises(InputError, match=r"checkpoint 1 in .* was trained on another base"):
        Checkpoints(tmp_path, "another").restore(fresh(), 1)


def test_another_adapter_is_refused(tmp_path, trained):
    _, _, state, fresh = trained
    saved(tmp_path, state, Progress(step=1))
    checkpoints = Checkpoints(tmp_path, "base")
    with pytest.raises(
        InputError, match=r"another adapter: .*'a'.* is \(\(24, 4\), 'float32'\) there and \(\(24, 3\), 'float32'\)"
    ):
        checkpoints.restore(fresh(rank=3), 1)
    half = fresh()
    half = half.replace(adapters=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), half.adapters))
    with pytest.raises(InputError, match=r"'float32'\) there and .*'bfloat16'\) in this configuration"):
        checkpoints.restore(half, 1)  # Orbax would cast it in silence
    less = fresh()
    del less.adapters["sites"]["down"]
    with pytest.raises(InputError, match=r"\['down'\].* there and None in this configuration"):
        checkpoints.restore(less, 1)


def test_an_adapter_without_sites_comes_back(tmp_path):
    """The baselines: a head that trains whole and nothing else; no masks."""
    optimizer = tiny.training(tiny.Toy(), METHOD)[1]
    adapters = {"sites": {}, "modules": {"down": {"kernel": jnp.ones((24, 99)), "bias": jnp.ones(99)}}}
    state = init_state(adapters, optimizer, jax.random.key(0), pruned=False)
    saved(tmp_path, state, Progress(step=1))
    zeros = init_state(jax.tree.map(jnp.zeros_like, adapters), optimizer, jax.random.key(1), pruned=False)
    checkpoints = Checkpoints(tmp_path, "base")
    restored, _ = checkpoints.restore(zeros, 1)
    checkpoints.close()
    chex.assert_trees_all_equal(tiny.snapshot(restored), tiny.snapshot(state))


def test_the_hash_names_paths_dtypes_shapes_and_values():
    kernel = jnp.asarray(tiny.normal(0, 64, 4))
    bases = [
        {"x": {"kernel": kernel}},
        {"y": {"kernel": kernel}},
        {"x": {"kernel": kernel.reshape(4, 64)}},
        {"x": {"kernel": kernel.at[3, 3].add(1e-6)}},
        {"x": {"kernel": kernel.astype(jnp.bfloat16)}},
        {"x": {"kernel": quantize(kernel)}},
        {"x": {"kernel": quantize(kernel, double_quantization=False)}},
        {"x": {"kernel": kernel.astype(jnp.bfloat16).view(jnp.uint16)}},
    ]
    assert len({hash_base(base) for base in bases}) == len(bases)
    assert hash_base(bases[0]) == hash_base({"x": {"kernel": np.asarray(kernel)}})


def test_a_run_goes_on_with_the_generator_it_was_started_with(tmp_path):
    """Dropout is drawn with rbg on an accelerator and with threefry on a CPU: on another device the checkpoint decides."""
    _, _, _, state = tiny.training(tiny.Toy(), Lora(rank=2))
    for generator, other in (GENERATORS, GENERATORS[::-1]):
        checkpoints = Checkpoints(tmp_path / generator, "base")
        saved = replace(state, rng=jax.random.key(3, impl=generator))
        checkpoints.save(saved, Progress(step=1))
        restored, _ = checkpoints.restore(replace(state, rng=jax.random.key(0, impl=other)), 1)
        checkpoints.close()
        assert restored.rng.dtype == saved.rng.dtype
        chex.assert_trees_all_equal(tiny.snapshot(restored), tiny.snapshot(saved))


def test_the_generator_of_a_run():
    """rbg where one accelerator draws; XLA would let each of several draw the whole batch's bits."""
    generators = {
        (platform, count): str(jax.random.key_impl(dropout_key(0, platform=platform, num_devices=count)))
        for platform, count in (("cpu", 1), ("cpu", 4), ("gpu", 1), ("tpu", 1), ("tpu", 8))
    }
    assert [place for place, generator in generators.items() if "rbg" in generator] == [("gpu", 1), ("tpu", 1)]
    assert sum("threefry" in generator for generator in generators.values()) == 3


def test_a_step_draws_with_either_generator():
    objective, optimizer, frozen, _ = tiny.training(tiny.Toy(), Lora(rank=2, dropout=0.5))
    adapters = tiny.adapted(tiny.Toy(), Lora(rank=2))[1]
    step, losses = make_train_step(objective, optimizer), []
    for generator in GENERATORS:
        state = init_state(adapters, optimizer, jax.random.key(0, impl=generator), pruned=False)
        losses += [float(step(state, frozen, tiny.batch())[1]["loss"])]
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
