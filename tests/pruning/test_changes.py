"""The schedules of sparse training: when they act, and what a change does to weights, masks, memory and moments."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxpeft.adapters.entry_effects import of_product
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCHEDULES, SCORES, Pruner, Selection
from jaxpeft.pruning.at_start import AtStart
from jaxpeft.pruning.iterative import Iterative
from jaxpeft.pruning.rewire import RigL, Set
from jaxpeft.pruning.schedules import ScheduleOptions
from jaxpeft.pruning.straight_through import StraightThrough
from jaxpeft.pruning.structures import Blocks, Groups, Ranks
from jaxpeft.training.optimizer import build_optimizer, fresh_moments
from jaxpeft.training.step import init_state, prune_step

RUN = {"sparsity": 0.5, "num_steps": 100, "warmup_steps": 5, "begin": None, "end": 0.6, "every_steps": 20}
RUN |= {"rounds": 3, "rewind": 0.05, "drop_fraction": 0.3}


def state_of(sites, *remembers, optimizer=None):
    adapters = {"sites": jax.tree.map(jnp.asarray, sites), "modules": {}}
    optimizer = optimizer or optax.identity()
    return init_state(adapters, optimizer, jax.random.key(0), pruned=True, remembers=remembers)


def after(state, schedule, step, pruner=None):
    """The state after what `schedule` does at `step`, as the loop asks for it."""
    pruner = pruner or Pruner()
    counts = pruner.selection.counts(state.adapters["sites"], schedule.sparsity_at(step))
    numbers = schedule.numbers_at(step)
    return prune_step(state, counts, numbers, pruner=pruner, change=schedule.change_at(step))


def due(schedule, steps=101):
    return [step for step in range(steps) if schedule.due(step)]


def pair(seed=0, rank=4):
    return {"x": {"a": tiny.normal(seed, 8, rank), "b": tiny.normal(seed + 1, rank, 6)}}


def number_kept(state):
    return [int(mask.sum()) for mask in jax.tree.leaves(state.masks)]


def test_shares_of_a_run_become_steps():
    assert SCHEDULES["at-start"].plan(ScheduleOptions(**RUN)) == AtStart(0.5)
    assert SCHEDULES["iterative"].plan(ScheduleOptions(**RUN)) == Iterative(0.5, (10, 35, 60), 5)
    assert Iterative.plan(ScheduleOptions(**{**RUN, "rounds": 1, "rewind": 0.0})) == Iterative(0.5, (10,), 0)
    assert SCHEDULES["rigl"].plan(ScheduleOptions(**RUN)) == RigL(0.5, 60, 20, 0.3)
    assert SCHEDULES["set"].plan(ScheduleOptions(**{**RUN, "drop_fraction": 0.1})) == Set(0.5, 60, 20, 0.1)
    assert SCHEDULES["straight-through"].plan(ScheduleOptions(**RUN)) == StraightThrough(0.5, 10, 60, 20)


def test_days_and_last_days():
    assert due(AtStart(0.5)) == [0] == [AtStart(0.5).last_step]
    iterative = Iterative(0.5, (10, 35, 60), 5)
    assert due(iterative) == [5, 10, 35, 60]
    assert [step for step in range(101) if iterative.changes_masks_at(step)] == [10, 35, 60]
    assert due(Iterative(0.5, (10,), 0)) == [10]
    assert iterative.last_step == 60
    assert due(RigL(0.5, 65, 20, 0.3)) == [0, 20, 40, 60]
    assert RigL(0.5, 65, 20, 0.3).last_step == 60


def test_every_round_prunes_the_same_share_of_the_rest():
    schedule = Iterative(0.875, (10, 20, 30), 5)
    assert [schedule.sparsity_at(step) for step in (9, 10, 20, 30, 99)] == pytest.approx([0, 0.5, 0.75, 0.875, 0.875])


def test_the_share_that_moves_falls_along_a_cosine():
    schedule = RigL(0.5, 60, 20, 0.3)
    expected = {0: 0.3, 20: 0.15 * (1 + math.cos(math.pi / 3)), 40: 0.15 * (1 - math.cos(math.pi / 3)), 60: 0.0}
    assert {step: schedule.numbers_at(step)["fraction"] for step in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("at-start", {"begin": 0.1}, r"pruning\.begin 0\.1 has no meaning for pruning\.schedule at-start"),
        ("rigl", {"begin": 0.1}, r"pruning\.begin 0\.1 has no meaning for pruning\.schedule rigl"),
        ("set", {"every_steps": 61}, r"pruning\.every_steps 61 is beyond step 60, the end of pruning\.schedule set"),
        ("iterative", {"rounds": 60}, r"60 rounds of pruning from step 10 to 60 do not fit"),
        ("iterative", {"end": 1.0}, r"3 rounds of pruning from step 10 to 100 do not fit into 100 steps"),
        ("iterative", {"rewind": 0.1}, r"pruning\.rewind 0\.1 is step 10, not before the first pruning at 10"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(name, changed, message):
    with pytest.raises(InputError, match=message):
        SCHEDULES[name].plan(ScheduleOptions(**{**RUN, **changed}))


@pytest.mark.parametrize("structure", [Ranks((("a", "b"),)), Groups(2, 4)])
def test_rigl_and_set_refuse_units_that_cannot_grow(structure):
    with pytest.raises(InputError, match=r"pruning\.schedule rigl grows single entries or blocks"):
        RigL(0.5, 60, 20, 0.3).check(Pruner(selection=Selection(("a", "b"), structure)))


def test_at_the_start_only_a_is_masked():
    """Trap 1: B = 0 has no order. What is zero everywhere stays whole."""
    sites = {"x": {"a": tiny.normal(0, 8, 4), "b": np.zeros((4, 6), np.float32)}}
    for name in ("magnitude", "random"):
        pruner = Pruner(SCORES[name], Selection(("a", "b")))
        AtStart(0.5).check(pruner)
        AtStart(0.5).check_start(pruner, sites)
        assert number_kept(after(state_of(sites), AtStart(0.5), 0, pruner)) == [16, 24]


def test_at_the_start_whole_ranks_go_at_random():
    sites = {"x": {"a": tiny.normal(0, 8, 4), "b": np.zeros((4, 6), np.float32)}}
    pruner = Pruner(SCORES["random"], Selection(("a", "b"), Ranks((("a", "b"),)), "global"))
    AtStart(0.5).check(pruner)
    AtStart(0.5).check_start(pruner, sites)
    masks = after(state_of(sites), AtStart(0.5), 0, pruner).masks["x"]
    np.testing.assert_array_equal(masks["a"].all(0), masks["b"].all(1))
    assert number_kept(after(state_of(sites), AtStart(0.5), 0, pruner)) == [16, 12]


def test_at_the_start_scores_that_are_zero_everywhere_are_refused():
    sites = {"x": {"a": tiny.normal(0, 8, 4), "b": np.zeros((4, 6), np.float32)}}
    schedule, both = AtStart(0.5), Selection(("a", "b"))
    with pytest.raises(
        InputError, match=r"only scores of 0 in 'a' of layer x, because a factor is 0 before the first step"
    ):
        schedule.check_start(Pruner(SCORES["product"], both, of_product), sites)
    with pytest.raises(InputError, match=r"only scores of 0 in 'a·b' of layer x"):
        schedule.check_start(Pruner(selection=Selection(("a", "b"), Ranks((("a", "b"),)))), sites)
    for name in ("snip", "movement"):
        with pytest.raises(InputError, match="at-start needs scores without gradients"):
            schedule.check(Pruner(SCORES[name], both))
    with pytest.raises(InputError, match=r"pruning\.scope global cannot be used with pruning\.schedule at-start"):
        schedule.check(Pruner(SCORES["random"], Selection(("a", "b"), scope="global")))


def test_straight_through_keeps_the_weights_until_the_masks_are_hard():
    schedule, sites = StraightThrough(0.5, 0, 20, 10), pair()
    state = after(state_of(sites, "soft"), schedule, 10)
    assert bool(state.memory["soft"])
    assert number_kept(state) == [18, 14]  # 1 − 7/16 of 32 and 24: round(18) and round(13.5)
    for name, value in sites["x"].items():
        np.testing.assert_array_equal(state.adapters["sites"]["x"][name], value)
    # An entry that was masked outgrows the others and comes back.
    lowest = int(np.abs(sites["x"]["a"]).argmin())
    grown = {"x": {**sites["x"], "a": sites["x"]["a"].copy()}}
    grown["x"]["a"].flat[lowest] = 9.0
    assert not state.masks["x"]["a"].reshape(-1)[lowest]

    state = replace(state, adapters={"sites": jax.tree.map(jnp.asarray, grown), "modules": {}})
    state = after(state, schedule, 20)
    assert not bool(state.memory["soft"])
    assert state.masks["x"]["a"].reshape(-1)[lowest]
    assert number_kept(state) == [16, 12]
    for name, mask in state.masks["x"].items():
        np.testing.assert_array_equal(state.adapters["sites"]["x"][name], np.where(mask, grown["x"][name], 0))


def test_the_weights_of_an_earlier_step_come_back():

    schedule, early, late = Iterative(0.5, (10, 20), 5), pair(0), pair(7)
    state = after(state_of(early, "rewound"), schedule, 5)
    assert number_kept(state) == [32, 24]
    state = replace(state, adapters={"sites": jax.tree.map(jnp.asarray, late), "modules": {}})
    state = after(state, schedule, 10)
    mask = state.masks["x"]["a"]
    magnitudes = np.abs(late["x"]["a"])
    assert magnitudes[mask].min() >= magnitudes[~np.asarray(mask)].max()  # by the trained weights
    np.testing.assert_array_equal(state.adapters["sites"]["x"]["a"], np.where(mask, early["x"]["a"], 0))


def rewired(schedule, *, gradient=None, pruner=None, rounds=3, sites=None):
    """States before and after each change of `schedule`, with weights that are drawn anew wherever the masks keep them."""

    sites = sites or pair()
    state = after(state_of(sites, *schedule.remembers), schedule, 0, pruner)
    for i in range(1, rounds + 1):
        values = jax.tree.map(
            lambda mask: jnp.where(mask, jnp.asarray(tiny.normal(i, *mask.shape)), 0),  # noqa: B023
            state.masks,
        )
        memory = {"gradient": jax.tree.map(jnp.asarray, gradient)} if gradient else state.memory
        state = replace(state, adapters={"sites": values, "modules": {}}, memory=memory)
        new = after(state, schedule, i * schedule.every_steps, pruner)
        yield state, new
        state = new


@pytest.mark.parametrize("kind", [RigL, Set])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_count_never_changes(kind, scope):
    pruner = Pruner(SCORES["product"], Selection(("a", "b"), scope=scope), of_product)
    schedule = kind(0.7, 100, 10, 0.5)
    total = {"tensor": [round(32 * 0.3), round(24 * 0.3)], "global": [round(56 * 0.3)]}[scope]
    for before, new in rewired(schedule, gradient=pair(3) if kind is RigL else None, pruner=pruner):
        numbers = number_kept(new)
        assert (numbers if scope == "tensor" else [sum(numbers)]) == total
        assert all(numbers)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.masks, new.masks)
        assert any(jax.tree.leaves(moved))


def test_rigl_drops_the_smallest_weights_and_grows_the_largest_gradients():
    schedule, gradient = RigL(0.5, 100, 10, 0.5), pair(3)
    before, new = next(rewired(schedule, gradient=gradient))
    share = schedule.numbers_at(10)["fraction"]
    for name, mask in before.masks["x"].items():
        mask, after_ = np.asarray(mask), np.asarray(new.masks["x"][name])
        weights, grads = np.abs(before.adapters["sites"]["x"][name]), np.abs(gradient["x"][name])
        number = int(share * mask.sum())
        order = np.argsort(np.where(mask, -weights, np.inf).reshape(-1))
        survivors = np.zeros(mask.size, bool)
        survivors[order[: mask.sum() - number]] = True
        growing = np.where(survivors, -np.inf, grads.reshape(-1))
        expected = survivors.copy()
        expected[np.argsort(-growing)[:number]] = True
        np.testing.assert_array_equal(after_.reshape(-1), expected)
        values = np.asarray(new.adapters["sites"]["x"][name]).reshape(-1)
        np.testing.assert_array_equal(values != 0, survivors)  # grown entries start at zero


def test_set_grows_another_draw_each_time():
    schedule = Set(0.9, 1000, 10, 0.9)
    grown = [new.masks["x"]["a"] & ~before.masks["x"]["a"] for before, new in rewired(schedule)]
    assert (grown[0] != grown[1]).any()


def test_blocks_move_as_a_whole():
    sites = {"x": {"a": tiny.normal(0, 8, 6)}}
    pruner = Pruner(selection=Selection(("a",), Blocks(2, 4)))
    for _, new in rewired(Set(0.5, 1000, 10, 0.5), pruner=pruner, sites=sites):
        mask = np.asarray(new.masks["x"]["a"])
        blocks = mask[::2, ::4]
        np.testing.assert_array_equal(np.repeat(np.repeat(blocks, 2, 0), 4, 1)[:, :6], mask)
        assert blocks.sum() == 4


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_grown_entry_has_fresh_moments(accumulation_steps):
    optimizer = build_optimizer(
        optax.constant_schedule(0.1), weight_decay=0.1, max_grad_norm=1.0, accumulation_steps=accumulation_steps
    )
    state = state_of(pair(), "gradient", optimizer=optimizer)
    ones = jax.tree.map(jnp.ones_like, state.adapters)
    opt_state = state.opt_state
    for _ in range(accumulation_steps):
        _, opt_state = optimizer.update(ones, opt_state, state.adapters, masks=state.masks)
    fresh = {"x": {name: jnp.zeros(leaf.shape, bool).at[0, 0].set(True) for name, leaf in pair()["x"].items()}}
    inner = opt_state.inner_opt_state if accumulation_steps > 1 else opt_state
    after_ = fresh_moments(opt_state, fresh)
    new = after_.inner_opt_state if accumulation_steps > 1 else after_
    (old_adam,), (adam,) = ([n for n in jax.tree.leaves(each, is_leaf=is_adam) if is_adam(n)] for each in (inner, new))
    for moment, was in ((adam.mu, old_adam.mu), (adam.nu, old_adam.nu)):
        for name, value in moment["sites"]["x"].items():
            assert value[0, 0] == 0
            assert (value != 0).sum() == value.size - 1
            np.testing.assert_array_equal(value[1:], was["sites"]["x"][name][1:])
    assert adam.count == old_adam.count == 1


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


PADDED = {
    "entries": (RigL(0.5, 100, 10, 0.5), Pruner(SCORES["product"], Selection(("a", "b"), scope="global"), of_product)),
    "random": (Set(0.5, 100, 10, 0.5), Pruner(SCORES["random"], Selection(("a", "b"), scope="layer"))),
    "blocks": (Set(0.5, 100, 10, 0.5), Pruner(selection=Selection(("a", "b"), Blocks(3, 4)))),
    "groups": (StraightThrough(0.5, 0, 10, 5), Pruner(SCORES["movement"], Selection(("a", "b"), Groups(1, 2)))),
    "ranks": (StraightThrough(0.5, 0, 10, 5), Pruner(SCORES["movement"], Selection(("a", "b"), Ranks((("a", "b"),))))),
}


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_never_kept_and_changes_nothing(name):
    """A run of rank 4 that is padded to 5, because it trains together with a run of rank 5, has the masks that it has alone."""
    schedule, pruner = PADDED[name]
    names = {*schedule.remembers, *([pruner.criterion.remembers] if pruner.criterion.remembers else ())}
    state = state_of(pair(), *names)
    # Movement scores can be negative, and those of padding are zero.
    memory = {
        key: value if key == "soft" else jax.tree.map(lambda w: -jnp.abs(w), pair(5))
        for key, value in state.memory.items()
    }
    state = replace(state, memory=memory)

    def padded(leaf):
        if leaf.ndim < 2:
            return leaf
        return jnp.pad(leaf, [(0, 5 - size if size == 4 else 0) for size in leaf.shape])

    wide = jax.tree.map(padded, replace(state, rng=None))
    wide = replace(wide, rng=state.rng)
    shapes = jax.tree.map(lambda leaf: np.asarray(leaf.shape, np.int32), state.adapters["sites"])
    for step in (0, 10):
        arguments = (
            pruner.selection.counts(state.adapters["sites"], schedule.sparsity_at(step)),
            schedule.numbers_at(step),
        )
        change = schedule.change_at(step)
        state = prune_step(state, *arguments, pruner=pruner, change=change)
        wide = prune_step(wide, *arguments, shapes, pruner=pruner, change=change)
        for key, mask in state.masks["x"].items():
            mask = np.asarray(mask)
            np.testing.assert_array_equal(wide.masks["x"][key][: mask.shape[0], : mask.shape[1]], mask)
            assert int(wide.masks["x"][key].sum()) == mask.sum()
            assert 0 < mask.sum() <= mask.size
