"""Which layers are adapted, by hand; `test_targets_against_peft.py` asks PEFT itself."""

import re

import pytest

from jaxpeft.adapters import Site
from jaxpeft.errors import InputError
from jaxpeft.families import FAMILIES
from jaxpeft.targets import (
    check_patterns,
    default_feedforward,
    default_targets,
    match_modules,
    match_targets,
)
from jaxpeft.trees import pattern_value

NAMES = [
    "enc/0/query",
    "enc/0/key",
    "enc/1/query",
    "enc/1/my_query",
    "enc/1/out/dense",
    "pooler/dense",
    "query",
]
SITES = {name: Site(name, 4, 4) for name in NAMES} | {"words": Site("words", 9, 4, "embedding")}

# Two stacks, so that the index in question is the first one and a pattern can tell them apart.
DEEP_NAMES = [
    f"m/{stack}/{i}/h/{j}/{name}" for stack in ("enc", "dec") for i in (0, 1) for j in (7, 8) for name in "qk"
]
DEEP = {name: Site(name, 4, 4) for name in [*DEEP_NAMES, "m/pool/q"]}


@pytest.mark.parametrize(
    ("targets", "options", "expected"),
    [
        (["query"], {}, ["enc/0/query", "enc/1/query", "query"]),  # exactly, or by suffix after a dot
        (["0.query"], {}, ["enc/0/query"]),
        (["out.dense", "key"], {}, ["enc/0/key", "enc/1/out/dense"]),
        (["enc.1.my_query"], {}, ["enc/1/my_query"]),
        ("query", {}, ["query"]),  # a string is a regular expression for the whole name
        (r".*\.query", {}, ["enc/0/query", "enc/1/query"]),
        (r"enc\.1\..*(query|dense)", {}, ["enc/1/query", "enc/1/my_query", "enc/1/out/dense"]),
        # A regular expression may match a block where the block is left out.
        (r"enc\.1\..*", {"exclude_modules": r".*(out|dense)"}, ["enc/1/query", "enc/1/my_query"]),
        (["words", "key"], {}, ["enc/0/key", "words"]),
        ("w.*", {}, ["words"]),
        (r".*query|.*key", {}, ["enc/0/query", "enc/0/key", "enc/1/query", "enc/1/my_query", "query"]),
        ("all-linear", {}, NAMES),
        ("All-Linear", {}, NAMES),
        (["query"], {"exclude_modules": ["0.query"]}, ["enc/1/query", "query"]),
        (["query"], {"exclude_modules": r"enc\..*"}, ["query"]),
        ("all-linear", {"exclude_modules": ["dense", "key"]}, [n for n in NAMES if "query" in n]),
        (["dense"], {"fully_trained_layers": ["pooler/dense"]}, ["enc/1/out/dense"]),
        ("all-linear", {"fully_trained_layers": NAMES[1:]}, ["enc/0/query"]),
    ],
)
def test_rules(targets, options, expected):
    chosen = match_targets(SITES, targets, **options)
    assert list(chosen) == expected
    assert all(chosen[path] is SITES[path] for path in chosen)


@pytest.mark.parametrize(
    ("targets", "indices", "pattern", "expected"),
    [
        (["q"], 0, None, r"m/\w+/0/h/./q"),  # the first number counts
        (["q"], [0, 1], None, r"m/\w+/./h/./q"),
        (["q", "k"], [1], (), r"m/\w+/1/h/.*"),
        (["q"], [1], "", r"m/\w+/1/h/./q"),
        (["q"], [1], "enc", r"m/enc/1/h/./q"),
        (["q"], [1], ["enc", "dec"], r"m/\w+/1/h/./q"),
        (["q"], [8], "h", r"m/\w+/./h/8/q"),
        (["q"], [1, 8], ["enc", "h"], r"m/enc/1/h/./q|m/dec/./h/8/q"),  # the first pattern that matches a name counts
        (["q"], [0], "(e.c|dec)", r"m/\w+/0/h/./q"),  # a pattern is a regular expression
        (["q"], [], None, r".*/q"),  # no index is no choice
        (["q", "m.pool.q"], [0], None, r"m/\w+/0/h/./q|m/pool/q"),  # a full name is taken whatever its index
        (["7.q", "m.enc.1.h.8.k"], [0], None, r"m/\w+/0/h/7/q|m/enc/1/h/8/k"),
    ],
)
def test_indices_choose_among_the_layers_that_a_list_names(targets, indices, pattern, expected):
    chosen = match_targets(DEEP, targets, layers_to_transform=indices, layers_pattern=pattern)
    assert list(chosen) == [name for name in DEEP if re.fullmatch(expected, name)]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["q"], {"layers_to_transform": 2}, r"layers_to_transform 2 matches none .*; their indices are 0, 1$"),
        (["q"], {"layers_to_transform": [0, -1]}, r"layers_to_transform -1 matches none .* are 0, 1$"),
        (["pool.q"], {"layers_to_transform": 0}, r"layers_to_transform 0 .*; none of them has an index: leave it out"),
        (
            # As PEFT reads it, two expressions: "enc" without an index, and "dec" where a name begins.
            ["q"],
            {"layers_to_transform": 0, "layers_pattern": "enc|dec"},
            r"none of them has an index after layers_pattern 'enc\|dec': leave it out",
        ),
        (
            ["k", "pool.q"],
            {"layers_to_transform": 0},
            r"target_modules 'pool\.q' matches no layer with an index .* full name, .*: m\.pool\.q",
        ),
        (
            ["q"],
            {"layers_to_transform": 0, "layers_pattern": ["enc", "deck"]},
            r"layers_pattern 'deck' matches none .*; did you mean 'dec'\?; their indices follow dec, enc, h$",
        ),
        (
            ["q"],
            {"layers_to_transform": 0, "layers_pattern": "(enc"},
            r"layers_pattern '\(enc' is not a regular expres",
        ),
        (["q"], {"layers_pattern": "enc"}, r"layers_pattern 'enc' has no effect without layers_to_transform; name ind"),
        (["q"], {"layers_pattern": ["enc"], "layers_to_transform": []}, r"layers_pattern \['enc'\] has no effect"),
        (
            ".*q",
            {"layers_to_transform": [0]},
            r"layers_to_transform \[0\] needs a list .* '\.\*q' is a string; list nam",
        ),
        ("all-linear", {"layers_to_transform": 0}, "layers_to_transform 0 needs a list .*'all-linear' is a string"),
        (".*q", {"layers_pattern": "enc"}, "layers_pattern 'enc' needs a list of target_modules"),
    ],
)
def test_an_index_or_a_pattern_that_chooses_nothing_is_refused(targets, options, message):
    with pytest.raises(InputError, match=message):
        match_targets(DEEP, targets, **options)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (
            ["quary"],
            {},
            "target_modules 'quary' matches no layer; did you mean 'query'.*end in dense, key, my_query, query",
        ),
        (["query", "kay"], {}, "'kay' matches no layer; did you mean 'key'"),  # one bad entry among good ones
        (["uery"], {}, "'uery' matches no layer"),  # a suffix starts after a dot
        ("enc.0", {}, r"'enc\.0', read as a regular expression, matches no layer.*a name: enc\.0\.query"),
        ("key", {}, r"'key', read as a regular expression, .* write a list, \[key\]"),
        ("que(ry", {}, r"'que\(ry' is not a regular expression"),
        (
            ["key"],
            {"exclude_modules": ["key"]},
            "'key' matches no layer that is left: exclude_modules excludes, or mod",
        ),
        (["query", "key"], {"exclude_modules": ["key"]}, "'key' matches no layer that is left"),
        (
            ["pooler.dense"],
            {"fully_trained_layers": ["pooler/dense"]},
            r"'pooler\.dense' matches no layer that is left",
        ),
        (["all-linear"], {}, r"\['all-linear'\] matches no layer; write it as a string"),
        (["wards"], {}, "did you mean 'words'.*end in dense, key, my_query, query; its embeddings are words$"),
        (["out"], {}, "'out' matches no layer"),  # a block, which PEFT refuses too
        (r"enc\.1\..*", {}, r"matches the block enc\.1\.out besides layers, which PEFT refuses; end it with names"),
        ([], {}, r"target_modules \[\] leaves no layer to adapt"),
        ("all-linear", {"exclude_modules": ".*"}, "'all-linear' leaves no layer to adapt; name some in it, or take"),
        (["query"], {"exclude_modules": ["kay"]}, "exclude_modules 'kay' matches no layer .*; did you mean 'key'"),
        (["query"], {"exclude_modules": ["key", "pooler"]}, "'pooler' matches no layer .* or name layers, not blocks"),
        (["query"], {"exclude_modules": "key"}, "exclude_modules 'key' matches no layer .* or name whole names"),
        (["query"], {"exclude_modules": "k(ey"}, r"exclude_modules 'k\(ey' is not a regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_and_the_nearest_named(targets, options, message):
    with pytest.raises(InputError, match=message):
        match_targets(SITES, targets, **options)


def test_distilbert_s_names_on_bert_are_refused(bert):
    """The model card this project grew from names BERT-base and trains `q_lin, v_lin`: there are none."""
    with pytest.raises(InputError, match=r"'q_lin' matches no layer.*end in dense, key, query, value"):
        match_targets(bert.sites(), ["q_lin", "v_lin"])


def test_whole_modules_are_matched_by_the_end_of_their_name():
    leaves = ["bert/pooler/dense/kernel", "pre_classifier/kernel", "classifier/kernel", "classifier/bias", "cls/x/bias"]
    assert match_modules(leaves, ["classifier"]) == {"pre_classifier/kernel", "classifier/kernel", "classifier/bias"}
    assert match_modules(leaves, ["pooler"]) == {"bert/pooler/dense/kernel"}
    assert match_modules(leaves, ["cls"]) == {"cls/x/bias"}
    assert match_modules(leaves, []) == set()
    with pytest.raises(InputError, match="modules_to_save 'poolar' matches no module; did you mean 'pooler'"):
        match_modules(leaves, ["classifier", "poolar"])


PATTERNS = {"layer.0.query": 1, "query": 2, r"layer\.0\..*": 3, "^enc.*": 4, "value$": 5}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("enc/layer/0/query", 1),  # the first key that matches wins
        ("enc/layer/1/query", 2),
        ("query", 2),
        ("enc/layer/0/key", 3),
        ("enc/layer/1/key", 4),
        ("dec/value", 5),
        ("dec/my_query", 0),  # the end of a name starts after a dot
        ("query/dense", 0),
    ],
)
def test_the_first_pattern_that_matches_the_end_of_a_name_gives_the_value(path, expected):
    assert pattern_value(PATTERNS, path, 0) == expected


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_are_checked_by_the_rule_that_they_are_read_by(pattern):
    for path in [f"{a}{b}" for a in ("", "enc/", "enc/layer/0/", "dec/my_") for b in ("query", "key", "value")]:
        if pattern_value({pattern: True}, path, False):
            check_patterns([pattern], [path], "rank_pattern")
        else:
            with pytest.raises(InputError):
                check_patterns([pattern], [path], "rank_pattern")


def test_a_pattern_that_matches_no_adapted_layer_is_refused():
    check_patterns({}, SITES, "rank_pattern")
    check_patterns({"query": 4, "0.key": 8}, SITES, "rank_pattern")
    message = (
        "rank_pattern 'quary' matches no adapted layer; did you mean 'query'.*; the adapted layers end in key, query$"
    )
    with pytest.raises(InputError, match=message):
        check_patterns({"key": 4, "quary": 4}, ["enc/0/query", "enc/0/key"], "rank_pattern")
    with pytest.raises(InputError, match=r"alpha_pattern '\(key' is not a regular expression"):
        check_patterns({"(key": 4}, SITES, "alpha_pattern")


def test_every_default_is_known_for_the_same_model_types():
    for name in ("lora", "hira", "vera", "loha", "lokr", "adalora", "ia3", "shira", "supertuning", "s2ft"):
        assert all(default_targets(name, model_type) for model_type in FAMILIES)
        assert default_targets(name, "gpt2") == ()
    assert all(set(default_feedforward(t)) < set(default_targets("ia3", t)) for t in FAMILIES)
    assert default_feedforward("gpt2") == ()
    assert (
        default_targets("ln-tuning", "bert")
        == default_targets("bitfit", "bert")
        == default_targets("prompt-tuning", "bert")
        == ()
    )
    with pytest.raises(InputError, match=r"there is no adapter method 'lroa'; did you mean 'lora'\?"):
        default_targets("lroa", "bert")
