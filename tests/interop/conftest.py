"""Each case trained once a session, whatever tests ask for it."""

import functools

import pytest
import torch_side
from trained import train


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
