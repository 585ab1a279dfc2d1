"""From flags to a plan: what is refused before anything is loaded, and what a run remembers."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.adapters import METHODS, Hira, Loha, Lora, S2ft
from jaxpeft.config import PruningConfig, TrainingConfig
from jaxpeft.errors import InputError
from jaxpeft.pruning import SCORES, Selection
from jaxpeft.pruning.structures import Groups, Ranks
from jaxpeft.report.sparsity import read_records
from jaxpeft.report.sparsity_log import SparsityLog
from jaxpeft.runs.schedule import check_pruning, make_plan


def planned(method, **pruning):
    training = TrainingConfig(num_steps=100, warmup_steps=5)
    return make_plan(
        training, PruningConfig(**{"sparsity": 0.5, **pruning}), batches_per_epoch=10, metric="loss", method=method
    )


def test_flags_become_a_pruner():
    pruner = planned(Lora(), structure="2:4", criterion="snip").pruner
    assert (pruner.criterion, pruner.selection) == (SCORES["snip"], Selection(("a", "b"), Groups(2, 4)))
    pruner = planned(Hira(), structure="rank", scope="global").pruner
    assert pruner.selection == Selection(("a", "b"), Ranks((("a", "b"),)), "global")
    dense = planned(Lora(), sparsity=0.0, structure="rank", scope="global")
    assert (dense.pruning, dense.remembers) == (None, ())


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({}, set()),
        ({"criterion": "snip"}, {"gradient"}),
        ({"schedule": "rigl", "every_steps": 5, "criterion": "snip"}, {"gradient"}),
        ({"schedule": "set", "every_steps": 5}, set()),
        ({"schedule": "straight-through", "criterion": "movement"}, {"soft", "movement"}),
        ({"schedule": "iterative"}, {"rewound"}),
    ],
)
def test_a_run_remembers_only_what_it_needs(flags, names):
    remembers = planned(Lora(), **flags).remembers
    assert len(remembers) == len(names)
    assert set(remembers) == names


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        (Lora(), {"scope": "global"}, r"pruning\.scope global compares scores of different tensors"),
        (
            Lora(),
            {"structure": "2:4", "sparsity": 0.6},
            r"2:4 prunes 0\.5 of the entries, and pruning\.sparsity is 0\.6",
        ),
        (Lora(), {"structure": "2:4", "scope": "layer"}, r"pruning\.scope layer has no meaning for n:m"),
        (Lora(), {"structure": "column"}, r"pruning\.structure is 'column'"),
        (Lora(), {"schedule": "rigl", "structure": "rank"}, r"rigl grows single entries or blocks"),
        (Lora(), {"schedule": "at-start", "criterion": "snip"}, r"at-start needs scores without gradients"),
        (Loha(), {"structure": "rank", "scope": "layer"}, r"pruning\.scope layer compares scores of different tensors"),
        (S2ft(), {"structure": "rank"}, r"pruning\.structure rank needs a method with low-rank products"),
    ],
)
def test_combinations_without_a_meaning_are_refused(method, flags, message):
    with pytest.raises(InputError, match=message):
        planned(method, **flags)


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.prunable])
def test_every_criterion_and_structure_has_a_meaning_for_every_method(name):
    """But whole ranks, for a method whose update has no product of a fixed rank."""
    method = METHODS[name]()
    for criterion, structure in product(SCORES, ("element", "2:4", "8x8", "rank")):
        if structure == "rank" and name in ("sora", "s2ft"):
            with pytest.raises(InputError, match=r"pruning\.structure rank needs a method with low-rank products"):
                planned(method, criterion=criterion, structure=structure)
        else:
            pruner = planned(method, criterion=criterion, structure=structure).pruner
            assert pruner.selection.prunable == method.prunable


def test_the_adapters_are_checked_before_the_run():
    odd = {"sites": {"x": {"a": jnp.ones((8, 6)), "b": jnp.ones((6, 8))}}, "modules": {}}
    with pytest.raises(InputError, match=r"2:4 needs an axis that 4 divides, and 'b' of layer x"):
        check_pruning(planned(Lora(rank=6), structure="2:4"), odd)
    fresh = {"sites": {"x": {"a": jnp.ones((8, 4)), "b": jnp.zeros((4, 8))}}, "modules": {}}
    with pytest.raises(InputError, match="finds only scores of 0 in 'a' of layer x"):
        check_pruning(planned(Lora(rank=4), schedule="at-start", criterion="product"), fresh)
    for flags in ({"schedule": "at-start"}, {"schedule": "set", "every_steps": 5}, {"sparsity": 0.0}, {}):
        check_pruning(planned(Lora(rank=4), **flags), fresh)


def test_the_log_of_kept_entries_goes_on_behind_the_checkpoint(tmp_path):
    path = tmp_path / "sparsity.jsonl"
    masks = {"x/y": {"a": np.array([[True, True, False]]), "b": np.ones((3, 2), bool)}}
    log = SparsityLog(path, 0)
    for step, before in ((4, {}), (8, masks)):
        log.write(step, masks, before)
    first = {
        "step": 4,
        "kept": {"x/y:a": 2, "x/y:b": 6},
        "size": {"x/y:a": 3, "x/y:b": 6},
        "ranks": {"x/y": 2},
        "churn": 1 / 9,
    }
    assert read_records(path) == [first, {**first, "step": 8, "churn": 0.0}]
    SparsityLog(path, 4).write(6, masks, masks)
    assert [row["step"] for row in read_records(path)] == [4, 6]
    SparsityLog(path, 4, writes=False).write(7, masks, masks)
    assert len(read_records(path)) == 2
    assert SparsityLog(path, 0).path.read_text() == ""
