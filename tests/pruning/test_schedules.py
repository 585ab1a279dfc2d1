import dataclasses

import pytest

import jaxpeft.pruning
from jaxpeft.config import PruningConfig
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCHEDULES, Cubic, OneShot, Schedule
from jaxpeft.pruning.schedules import ScheduleOptions

RUN = {"sparsity": 0.5, "num_steps": 100, "warmup_steps": 5, "begin": None, "end": 0.6, "every_steps": 7}
RUN |= {"rounds": 3, "rewind": 0.05, "drop_fraction": 0.3}


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


def test_a_run_s_shares_become_steps():
    assert SCHEDULES["one-shot"].plan(ScheduleOptions(**RUN)) == OneShot(0.5, 10)
    assert SCHEDULES["cubic"].plan(ScheduleOptions(**RUN)) == Cubic(0.5, 10, 60, 7)
    assert OneShot.plan(ScheduleOptions(**{**RUN, "begin": 0.25})) == OneShot(0.5, 25)
    assert Cubic.plan(ScheduleOptions(**{**RUN, "begin": 0.25, "end": 1.0})) == Cubic(0.5, 25, 100, 7)


def test_pruning_waits_for_the_warm_up_unless_it_is_told_otherwise():
    assert OneShot.plan(ScheduleOptions(**{**RUN, "warmup_steps": 30})).step == 30
    assert OneShot.plan(ScheduleOptions(**{**RUN, "warmup_steps": 30, "begin": 0.2})).step == 20
    assert OneShot.plan(ScheduleOptions(**{**RUN, "num_steps": 4, "warmup_steps": 0})).step == 1
    assert OneShot.plan(ScheduleOptions(**{**RUN, "begin": 1e-6})).step == 1


def test_schedules_that_do_not_fit_into_the_run_are_refused():
    with pytest.raises(InputError, match=r"begins at step 99, not below the run's 99; lower pruning\.begin"):
        OneShot.plan(ScheduleOptions(**{**RUN, "num_steps": 99, "begin": 0.999}))
    with pytest.raises(InputError, match=r"begins at step 60 and ends at 60 of 100; raise pruning\.end or lower"):
        Cubic.plan(ScheduleOptions(**{**RUN, "begin": 0.6}))


def test_every_schedule_is_one():
    assert all(issubclass(SCHEDULES[name], Schedule) for name in SCHEDULES)


def test_unknown_names_are_refused_when_the_configuration_is_built():
    with pytest.raises(InputError, match=r"no pruning schedule 'cubik'; did you mean 'cubic'\?"):
        PruningConfig(schedule="cubik")
    with pytest.raises(InputError, match="no pruning criterion 'gradient'; choose from magnitude"):
        PruningConfig(criterion="gradient")


def test_the_room_has_no_other_names():
    with pytest.raises(AttributeError, match=r"module 'jaxpeft\.pruning' has no attribute 'absent'"):
        _ = jaxpeft.pruning.absent
