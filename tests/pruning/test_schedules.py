import dataclasses

import pytest

from jaxpeft.pruning import Cubic, OneShot


def test_one_shot_prunes_once():
    schedule = OneShot(0.5, step=3)
    assert [step for step in range(10) if schedule.due(step)] == [3] == [schedule.last_step]
    assert [schedule.sparsity_at(step) for step in range(5)] == [0, 0, 0, 0.5, 0.5]


def test_cubic_follows_zhu_and_gupta():
    """s·(1 − (1 − p)³) at p = 0, 1/4, 1/2, 3/4, 1, by hand: 37/64, 7/8 and 63/64 of s."""
    schedule = Cubic(0.8, begin_step=10, end_step=50, every_steps=10)
    expected = {10: 0, 20: 0.8 * 37 / 64, 30: 0.8 * 7 / 8, 40: 0.8 * 63 / 64, 50: 0.8}
    assert {step: schedule.sparsity_at(step) for step in expected} == pytest.approx(expected, abs=1e-15)
    assert schedule.sparsity_at(0) == 0
    assert schedule.sparsity_at(51) == schedule.sparsity_at(10**6) == 0.8


@pytest.mark.parametrize(
    ("every", "due"),
    [(10, [20, 30, 40, 50]), (15, [25, 40, 50]), (100, [50]), (40, [50]), (39, [49, 50]), (1, list(range(11, 51)))],
)
def test_cubic_is_due_every_so_often_and_at_its_end(every, due):
    schedule = Cubic(0.5, begin_step=10, end_step=50, every_steps=every)
    assert [step for step in range(100) if schedule.due(step)] == due
    assert schedule.last_step == due[-1]


def test_sparsity_never_falls():
    schedule = Cubic(0.9, begin_step=3, end_step=17, every_steps=2)
    values = [schedule.sparsity_at(step) for step in range(30)]
    assert values == sorted(values)


def test_schedules_are_values():
    assert OneShot(0.5, 3) == OneShot(0.5, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        OneShot(0.5, 3).step = 4
