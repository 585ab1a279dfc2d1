"""Two tiers of tests: what `pytest` runs, and what is marked slow and runs with `-m ""` too."""

import pytest

slow = pytest.mark.slow


def slow_but(names, *fast):
    """The parameters `names`, all marked slow but `fast`: one case of a kind is enough to see at once that it broke.

    For `parametrize` or a fixture's `params`; ids are the values as text.
    """
    names = list(names)
    missing = [name for name in fast if name not in names]
    assert not missing, f"no such case: {missing}"
    return [pytest.param(name, marks=() if name in fast else slow, id=str(name)) for name in names]
