"""Which layers are adapted: PEFT's rules, by hand and against torch PEFT itself."""

from copy import deepcopy

import pytest
import tiny

from jaxpeft.adapters import Site
from jaxpeft.errors import InputError
from jaxpeft.paths import leaf_paths
from jaxpeft.targets import CLASSIFIER_HEADS, DEFAULT_TARGETS, match_targets, whole_modules

NAMES = [
    "enc/0/query",
    "enc/0/key",
    "enc/1/query",
    "enc/1/my_query",
    "enc/1/out/dense",
    "pooler/dense",
    "query",
]
SITES = {name: Site(name, 4, 4) for name in NAMES}


@pytest.mark.parametrize(
    ("targets", "options", "expected"),
    [
        (["query"], {}, ["enc/0/query", "enc/1/query", "query"]),  # exactly, or by suffix after a dot
        (["0.query"], {}, ["enc/0/query"]),
        (["out.dense", "key"], {}, ["enc/0/key", "enc/1/out/dense"]),
        (["enc.1.my_query"], {}, ["enc/1/my_query"]),
        ("query", {}, ["query"]),  # a string is a regular expression for the whole name
        (r".*\.query", {}, ["enc/0/query", "enc/1/query"]),
        (r"enc\.1\..*", {}, ["enc/1/query", "enc/1/my_query", "enc/1/out/dense"]),
        (r".*query|.*key", {}, ["enc/0/query", "enc/0/key", "enc/1/query", "enc/1/my_query", "query"]),
        ("all-linear", {}, NAMES),
        ("All-Linear", {}, NAMES),
        (["query"], {"exclude_modules": ["0.query"]}, ["enc/1/query", "query"]),
        (["query"], {"exclude_modules": r"enc\..*"}, ["query"]),
        ("all-linear", {"exclude_modules": ["dense", "key"]}, [n for n in NAMES if "query" in n]),
        (["dense"], {"whole_layers": ["pooler/dense"]}, ["enc/1/out/dense"]),
        ("all-linear", {"whole_layers": NAMES[1:]}, ["enc/0/query"]),
    ],
)
def test_rules(targets, options, expected):
    chosen = match_targets(SITES, targets, **options)
    assert list(chosen) == expected
    assert all(chosen[path] is SITES[path] for path in chosen)


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
        (["key"], {"exclude_modules": ["key"]}, "'key' matches no layer"),
        (["pooler.dense"], {"whole_layers": ["pooler/dense"]}, r"'pooler\.dense' matches no layer"),
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
    assert whole_modules(leaves, ["classifier"]) == {"pre_classifier/kernel", "classifier/kernel", "classifier/bias"}
    assert whole_modules(leaves, ["pooler"]) == {"bert/pooler/dense/kernel"}
    assert whole_modules(leaves, ["cls"]) == {"cls/x/bias"}
    assert whole_modules(leaves, []) == set()
    with pytest.raises(InputError, match="modules_to_save 'poolar' matches no module; did you mean 'pooler'"):
        whole_modules(leaves, ["classifier", "poolar"])


# What PEFT is given, for the torch twin of each tiny model: (model, task, LoraConfig's arguments).
PEFT_TABLE = [
    ("bert", "masked-lm", {"target_modules": ["query", "value"]}),
    ("bert", "masked-lm", {"target_modules": ["dense"]}),
    (
        "bert",
        "masked-lm",
        {"target_modules": ["attention.output.dense", "key"], "exclude_modules": ["0.attention.self.key"]},
    ),
    ("bert", "masked-lm", {"target_modules": r".*layer\.1\..*(query|dense)"}),
    ("bert", "masked-lm", {"target_modules": "all-linear"}),
    ("bert", "masked-lm", {"target_modules": "all-linear", "exclude_modules": r".*\.encoder\.layer\.0\..*"}),
    ("bert", "masked-lm", {}),
    ("bert", "classification", {"target_modules": "all-linear"}),
    ("bert", "classification", {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
    ("distilbert", "masked-lm", {"target_modules": ["q_lin", "v_lin"]}),
    ("distilbert", "masked-lm", {"target_modules": "all-linear"}),
    ("distilbert", "classification", {"target_modules": ["q_lin", "v_lin", "lin1"]}),
    ("distilbert", "classification", {"target_modules": "all-linear", "modules_to_save": ["pre_classifier"]}),
    ("roberta", "classification", {"target_modules": "all-linear"}),
    ("roberta", "masked-lm", {"target_modules": "all-linear", "exclude_modules": ["lm_head.dense"]}),
    ("roberta", "masked-lm", {"target_modules": ["lm_head.dense"]}),
    ("roberta", "classification", {"target_modules": ["query", "dense"]}),
    ("roberta", "classification", {}),
]


@pytest.mark.parametrize(("kind", "task", "arguments"), PEFT_TABLE)
def test_the_layers_are_those_that_torch_peft_adapts(tiny_models, kind, task, arguments):
    torch_adapted, torch_whole = peft_layers(kind, task, arguments)
    model = tiny_models(kind, task)
    leaves = list(leaf_paths(model.params))
    # PEFT trains a classifier's head whole; every task's `modules_to_save` come on top.
    heads = CLASSIFIER_HEADS[:1] if task == "classification" else ()
    whole = {leaf.rpartition("/")[0] for leaf in whole_modules(leaves, [*heads, *arguments.get("modules_to_save", [])])}
    targets = arguments.get("target_modules", DEFAULT_TARGETS[kind])
    chosen = match_targets(model.sites(), targets, exclude_modules=arguments.get("exclude_modules"), whole_layers=whole)
    assert {path.replace("/", ".") for path in chosen} == torch_adapted
    assert {path.replace("/", ".") for path in whole if path in model.sites()} == torch_whole


def test_all_linear_spares_distilbert_s_whole_head_where_peft_fails(tiny_models):
    """PEFT 0.21 adapts `pre_classifier`, unless it is named, and then cannot train it whole; here that is never adapted."""
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        peft_layers("distilbert", "classification", {"target_modules": "all-linear"})
    sites = tiny_models("distilbert", "classification").sites()
    heads = ["pre_classifier", "classifier"]
    assert list(match_targets(sites, "all-linear", whole_layers=heads)) == [s for s in sites if s not in heads]


def peft_layers(kind, task, arguments):
    """The names of the linear layers that torch PEFT adapts, and of those that it trains whole."""
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import LoraLayer
    from torch import nn
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    sizes = {key: value for key, value in tiny.CONFIGS[kind].items() if key != "model_type"}
    classification = task == "classification"
    auto = AutoModelForSequenceClassification if classification else AutoModelForMaskedLM
    config = peft.LoraConfig(r=2, task_type="SEQ_CLS" if classification else None, **deepcopy(arguments))
    model = peft.get_peft_model(auto.from_config(AutoConfig.for_model(kind, **sizes)), config).base_model.model
    modules = dict(model.named_modules())
    adapted = {name for name, module in modules.items() if isinstance(module, LoraLayer)}
    whole = {
        name.replace(".modules_to_save.default", "")
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and ".modules_to_save." in name
    }
    return adapted, whole
