"""When the entries of a sparse update are redrawn, and what is refused."""

import math

import jax.numpy as jnp
import pytest

from jaxpeft.adapters import Lora, S2ft, Shira, SuperTuning
from jaxpeft.config.adapter import redraws_entries
from jaxpeft.config.files import run_config
from jaxpeft.config.parsing import InputError
from jaxpeft.pruning.redraw import Redraw
from jaxpeft.report.methods import citations, method_name
from jaxpeft.runs.schedule import check_redraw, make_plan
from jaxpeft.trees import CONSTANTS


def config(method="shira", pruning=(), **adapter):
    values = {"data": {"name": "python-docs"}, "adapter": {"method": method, "rank": 2, **adapter}}
    pruning = {"schedule": "rigl", "every_steps": 20, **dict(pruning)}
    return run_config({**values, "pruning": pruning, "training": {"num_steps": 100, "warmup_steps": 5}}, "test")


def planned(method, **pruning):
    run = config(method.name if method else "head", pruning)
    return make_plan(run.training, run.pruning, batches_per_epoch=10, metric="loss", method=method)


def test_the_share_falls_along_a_cosine_to_zero():
    schedule = planned(Shira(), end=0.6).pruning
    assert schedule == Redraw("gradient", 60, 20, 0.3)
    assert [step for step in range(101) if schedule.due(step)] == [20, 40]  # at step 60 nothing would move
    assert schedule.last_step == 40
    assert schedule.share_at(20) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert schedule.share_at(60) == 0
    assert schedule.sparsity_at(50) == 0


def test_a_sparse_update_is_redrawn_and_the_others_are_not():
    plan = planned(SuperTuning(), schedule="set", drop_fraction=0.2)
    assert plan.pruning == Redraw("random", 60, 20, 0.2)
    assert plan.remembers == ()
    assert planned(Shira(), schedule="cubic").pruning is None
    for method in (Lora(), None):
        assert planned(method).pruning is None
    assert planned(S2ft(), sparsity=0.5).pruning.sparsity == 0.5  # its rows are pruned as before


def test_a_run_says_what_it_does():
    for schedule, title, source in (("rigl", "RigL", "1911.11134"), ("set", "SET", "1707.04780")):
        run = config(pruning={"schedule": schedule}, random_seed=3)
        sections = (run.adapter, run.pruning, run.model, run.contextual)
        assert method_name(*sections) == f"SHiRA redrawn by {title}"
        assert citations(*sections)[-1].startswith(f"{title}: ")
        assert source in citations(*sections)[-1]


REFUSED = {
    "begin": (lambda: planned(Shira(), begin=0.1), r"pruning\.begin 0\.1 has no meaning for a sparse update"),
    "never": (lambda: planned(Shira(), every_steps=60), r"pruning\.every_steps 60 is not below step 60"),
    "s2ft": (
        lambda: config("s2ft", rank=None),
        r"rigl redraws the entries of shira, supertuning, but what 's2ft' trains is chosen once; set it to one-shot",
    ),
    "sparsity": (
        lambda: config(pruning={"sparsity": 0.5}),
        r"pruning\.sparsity 0\.5 needs adapter\.method.*set it to 0",
    ),
    "criterion": (
        lambda: config(pruning={"criterion": "snip"}),
        r"criterion snip has no meaning .* set it to magnitude",
    ),
    "scope": (lambda: config(pruning={"scope": "global"}), r"scope global has no meaning .* set it to tensor"),
    "structure": (lambda: config(pruning={"structure": "rank"}), r"structure rank has no meaning .* set it to element"),
    "unsaved": (
        lambda: config("supertuning", save_precomputed_indices=False),
        r"save_precomputed_indices false cannot be used with pruning\.schedule rigl",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        make()


def test_options_of_other_schedules_and_methods_stay_as_they_were():
    runs = (
        config(pruning={"schedule": "cubic"}),
        config("lora", pruning={"criterion": "snip"}),
        config("head", rank=None),
        config("supertuning", pruning={"schedule": "one-shot"}, save_precomputed_indices=False),
    )
    assert not any(redraws_entries(run.adapter, run.pruning) for run in runs)
    assert runs[1].pruning.criterion == "snip"
    assert runs[3].adapter.save_precomputed_indices is False
    assert redraws_entries(config().adapter, config().pruning)


def test_a_layer_whose_entries_all_train_has_none_to_take_up():
    frozen = {"up": {"kernel": jnp.ones((3, 4))}, CONSTANTS: {"up": {"indices": jnp.arange(12)}}}
    with pytest.raises(InputError, match="all 12 entries of layer up train, so there are none to redraw"):
        check_redraw(planned(Shira()), frozen)
    check_redraw(planned(Shira(), schedule="one-shot"), frozen)
    check_redraw(planned(Shira()), {**frozen, CONSTANTS: {"up": {"indices": jnp.arange(11)}}})
