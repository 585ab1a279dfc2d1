"""Which runs may share a program: what is data in it may differ, and nothing else."""

import pytest

from jaxpeft.config.files import run_config
from jaxpeft.runs.sweep_key import chunked, sweep_key

BASE = {"data": {"name": "python-docs"}, "adapter": {"method": "lora", "rank": 8, "alpha": 16}}


def key(**changes):
    values = {**BASE, **{name: value for name, value in changes.items() if not isinstance(value, dict)}}
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] = {**BASE.get(name, {}), **value}
    return sweep_key(run_config(values, "test"))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"seed": 7},
        {"training": {"learning_rate": 1e-2}},
        {"pruning": {"sparsity": 0.5}},
        {"adapter": {"rank": 2}},
        {"adapter": {"alpha": 1.0}},
        {"adapter": {"dropout": 0.1}},
        {"adapter": {"init_lora_weights": "orthogonal"}},
        {"compilation_cache": None},
    ],
)
def test_what_may_differ(changes):
    assert key(**changes) == key()


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"num_steps": 7}},
        {"training": {"batch_size": 2}},
        {"training": {"warmup_steps": 1}},
        {"data": {"max_length": 64}},
        {"model": {"quantization": "nf4"}},
        {"model": {"dropout": 0.0}},
        {"adapter": {"use_dora": True}},
        {"adapter": {"target_modules": ["query"]}},
        {"adapter": {"rank_pattern": {"query": 2}}},
        {"evaluation": {"batch_size": 8}},
    ],
)
def test_what_may_not(changes):
    assert key(**changes) not in (key(), None)


@pytest.mark.parametrize(
    ("fixed", "changes"),
    [
        ({"rank_pattern": {"query": 2}}, {"rank": 2}),
        ({"alpha_pattern": {"query": 2.0}}, {"alpha": 2.0}),
        ({"alpha_pattern": {"query": 2.0}}, {"rank": 2}),
        ({"method": "loha"}, {"rank": 2}),
        ({"method": "adalora", "rank": None, "alpha": None}, {"dropout": 0.5}),
    ],
)
def test_options_that_a_program_cannot_read_as_data(fixed, changes):
    assert key(adapter=fixed) != key(adapter={**fixed, **changes})


def test_seeds_of_a_random_base_and_rates_of_lora_plus_stay_apart():
    random = {"weights": "random", "name": "config.json"}
    assert key(model=random) != key(model=random, seed=1)
    plus = {"loraplus_lr_ratio": 4.0}
    assert key(training=plus) != key(training={**plus, "learning_rate": 1e-2})


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "eva", "lora_ga", "pissa_niter_4"])
def test_starts_that_change_the_base_are_alone(start):
    assert key(adapter={"init_lora_weights": start}) is None


@pytest.mark.parametrize(
    ("options", "together"),
    [
        ({"method": "shira"}, False),
        ({"method": "shira", "random_seed": 3}, True),
        ({"method": "shira", "mask_type": "magnitude"}, True),
        ({"method": "supertuning", "alpha": None, "rank": None}, True),
        ({"method": "s2ft", "selection": "activation"}, False),
    ],
)
def test_seeds_that_choose_what_trains_stay_apart(options, together):
    """The indices are frozen with the base, and runs of a program have one base."""
    adapter = {**BASE["adapter"], **options}
    assert (key(adapter=adapter, seed=1) == key(adapter=adapter)) == together
    assert key(adapter=adapter, training={"learning_rate": 1e-2}) == key(adapter=adapter)


def test_entries_that_are_redrawn_are_alone():
    shira = {**BASE["adapter"], "method": "shira", "random_seed": 3}
    assert key(adapter=shira, pruning={"schedule": "rigl"}) is None
    assert key(adapter=shira, pruning={"schedule": "cubic"}) == key(adapter=shira) is not None
    assert key(pruning={"schedule": "rigl"}) == key()  # a LoRA's entries are pruned, or not


def test_full_fine_tuning_is_alone():
    assert key(adapter={"method": "full", "rank": None, "alpha": None}) is None
    assert key(adapter={"method": "head", "rank": None, "alpha": None}) is not None


def test_chunks_are_as_equal_as_can_be():
    assert chunked(list(range(9)), 8) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert chunked([1], 8) == [[1]]
    assert chunked([], 8) == []
