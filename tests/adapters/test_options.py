"""PEFT's names of options that have another name here, and misspelt ones."""

import copy
import dataclasses
import pickle

import pytest

import jaxpeft
from jaxpeft import InputError
from jaxpeft.adapters import METHODS
from jaxpeft.adapters.build import checked_options

PEFTS = [
    ("Lora", "r", "rank"),
    ("Lora", "lora_alpha", "alpha"),
    ("Lora", "lora_dropout", "dropout"),
    ("Hira", "r", "rank"),
    ("Hira", "hira_dropout", "dropout"),
    ("Vera", "vera_dropout", "dropout"),
    ("Loha", "r", "rank"),
    ("Lokr", "r", "rank"),
    ("Shira", "r", "rank"),
    ("AdaLora", "lora_alpha", "alpha"),
]


@pytest.mark.parametrize(("method", "theirs", "ours"), PEFTS)
def test_pefts_name_is_refused_with_ours(method, theirs, ours):
    with pytest.raises(
        InputError, match=rf"^{method} has no option '{theirs}', which is PEFT's name for it: call it {ours}$"
    ):
        getattr(jaxpeft, method)(**{theirs: 8})
    with pytest.raises(
        InputError, match=rf"adapter\.options: the method .* has no option '{theirs}', .*: call it {ours}$"
    ):
        checked_options(getattr(jaxpeft, method), {theirs: 8}, "adapter.options")


def test_a_misspelt_option():
    with pytest.raises(InputError, match=r"Lora has no option 'rnak'; did you mean 'rank'\?"):
        jaxpeft.Lora(rnak=8)
    with pytest.raises(InputError, match="BitFit has no option 'rank'; it has none"):
        jaxpeft.BitFit(rank=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"adapter\.rank 0 must be at least 1"),
        ({"dropout": 2}, r"adapter\.dropout 2 must be at least 0 and below 1"),
    ],
)
def test_a_value_out_of_its_range(options, message):
    with pytest.raises(InputError, match=message):
        jaxpeft.Lora(**options)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_can_still_be_made_copied_and_stored(name):
    method = METHODS[name]()
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == dataclasses.replace(method) == method
