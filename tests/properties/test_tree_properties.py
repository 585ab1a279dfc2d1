"""Trees are cut and joined without loss, whatever their names; PEFT's pattern rule is the same in both places that know it."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxpeft.adapters import Site
from jaxpeft.errors import InputError
from jaxpeft.targets import check_patterns, match_targets
from jaxpeft.trees import by_layer, by_leaf, join, leaf_paths, nest, pattern_value, split

NAMES = st.sampled_from(["enc", "layer", "0", "1", "10", "query", "key", "my_query", "dense"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
# Names, ends of names and regular expressions, some with an alternative without brackets.
PATTERNS = st.sampled_from(
    [
        "query",
        "key",
        "dense",
        r"0\..*",
        r".*query",
        r"layer\.\d+\.key",
        "query|key",
        "enc.*",
        r"\d\.dense",
        "nothing",
        "y",
    ]
)


@st.composite
def params(draw):
    """Nested dictionaries; no path is another's beginning."""
    paths = draw(st.lists(PATHS, min_size=1, max_size=8, unique=True))
    leaves = {f"{path}/{leaf}": i for i, path in enumerate(paths) for leaf in draw(st.sampled_from(["W", "Wb"]))}
    assume(not any(a != b and b.startswith(f"{a}/") for a in leaves for b in leaves))
    return nest(leaves)


@st.composite
def layers(draw):
    paths = draw(st.lists(PATHS, min_size=1, max_size=8, unique=True))
    return {path: Site(path, 4, 4) for path in paths}


@given(params())
def test_leaf_paths_and_nest_undo_each_other(tree):
    leaves = leaf_paths(tree)
    assert nest(leaves) == tree
    assert list(leaves) == sorted(leaves)
    assert by_leaf(by_layer(leaves)) == leaves


@given(params(), st.sets(st.integers(0, 15)))
def test_join_undoes_any_split(tree, chosen):
    leaves = leaf_paths(tree)
    selected = {path for i, path in enumerate(leaves) if i in chosen}
    rest, cut = split(tree, selected.__contains__)
    assert join(rest, cut) == tree
    assert set(by_leaf(cut)) == selected
    assert set(leaf_paths(rest)) == set(leaves) - selected


@given(st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3), PATHS)
def test_a_pattern_s_value_is_the_first_match_s(patterns, path):
    name = path.replace("/", ".")
    ends = [name[i:] for i in range(len(name)) if i == 0 or name[i - 1] == "."]
    # An alternative without brackets in PEFT's rule, which puts its own around the key.
    expected = next((v for key, v in patterns.items() if any(re.fullmatch(f"({key})", end) for end in ends)), None)
    assert pattern_value(patterns, path, None) == expected


@given(PATTERNS, layers())
def test_a_pattern_is_refused_exactly_if_it_would_have_no_effect(pattern, sites):
    if any(pattern_value({pattern: True}, path, False) for path in sites):
        check_patterns([pattern], sites, "rank_pattern")
    else:
        with pytest.raises(InputError, match=r"rank_pattern .* matches no adapted layer"):
            check_patterns([pattern], sites, "rank_pattern")


@given(layers(), st.data())
def test_targets_are_sites_and_the_order_of_a_list_means_nothing(sites, data):
    ends = sorted({path.rpartition("/")[2] for path in sites})
    names = data.draw(st.lists(st.sampled_from(ends), min_size=1, unique=True))
    chosen = match_targets(sites, names)
    assert chosen == {path: site for path, site in sites.items() if path.rpartition("/")[2] in names}
    assert match_targets(sites, data.draw(st.permutations(names))) == chosen
    assert list(chosen) == [path for path in sites if path in chosen]


@given(layers(), st.data())
def test_what_is_excluded_and_what_is_left_are_all_linear(sites, data):
    out = data.draw(st.sampled_from(sorted({path.rpartition("/")[2] for path in sites})))
    named = match_targets(sites, [out])
    if named == sites:
        with pytest.raises(InputError, match="leaves no layer to adapt"):
            match_targets(sites, "all-linear", exclude_modules=[out])
    else:
        left = match_targets(sites, "all-linear", exclude_modules=[out])
        assert left == {path: site for path, site in sites.items() if path not in named}
