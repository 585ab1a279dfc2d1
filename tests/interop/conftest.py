"""Each case trained once a session, whatever tests ask for it."""

import functools

import pytest
import torch_side
from trained import train

from jaxpeft import load_model


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function `Case → Trained`."""

    @functools.cache
    def make(case):
        directory = tmp_path_factory.mktemp(str(case))
        kind = case.task if case.head == "old" else "encoder"
        base = torch_side.write_base(directory / "base", case.model_type, kind, layers=case.layers)
        return train(case, base, directory / "adapter")

    return make


def _bases(tmp_path_factory, layers):
    @functools.cache
    def base(model_type, task):
        directory = torch_side.write_base(tmp_path_factory.mktemp("base"), model_type, task, layers=layers)
        return directory, load_model(str(directory), task)

    return base


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A function `(model_type, task) → (directory, our model)`, of two layers."""
    return _bases(tmp_path_factory, 2)


@pytest.fixture(scope="session")
def shallow_bases(tmp_path_factory):
    """The same with one layer, for what takes many steps."""
    return _bases(tmp_path_factory, 1)
