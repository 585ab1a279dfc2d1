"""The layers that are adapted, against those that torch PEFT adapts, and what PEFT refuses."""

import functools
import warnings
from copy import deepcopy

import pytest
import tiny

from jaxpeft.errors import InputError
from jaxpeft.families import family_of
from jaxpeft.targets import default_feedforward, default_targets, match_modules, match_targets
from jaxpeft.trees import leaf_paths, pattern_value

peft = pytest.importorskip("peft")

# ELECTRA and ALBERT as BERT's tiny config and what differs.
KIN = {
    "electra": {"model_type": "electra", "embedding_size": 16},
    "albert": {"model_type": "albert", "embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
}
CONFIGS = {"lora": peft.LoraConfig, "hira": peft.HiraConfig, "ia3": peft.IA3Config, "adalora": peft.AdaLoraConfig}
OPTIONS = {"lora": {"r": 2}, "hira": {"r": 2}, "ia3": {}, "adalora": {"init_r": 2, "target_r": 1, "total_step": 100}}
ENCODER = "bert.encoder.layer"
FULL_NAMES = [
    f"{ENCODER}.{i}.{end}"
    for i in (0, 1)
    for end in (*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense")
]
FEW = {"target_modules": ["query", "value"]}


def rows(task, *arguments, method="lora"):
    """`task` is "model_type task"; each of `arguments` is what PEFT's config is given."""
    model_type, name = task.split()
    return [(model_type, name, method, each) for each in arguments]


SAME = [
    *rows(
        "bert masked-lm",
        {},  # PEFT's defaults
        FEW,
        {"target_modules": ["dense"]},
        {"target_modules": ["output.dense"]},
        {"target_modules": ["0.attention.self.query", "1.output.dense"]},
        {"target_modules": FULL_NAMES[:3]},
        {"target_modules": r".*layer\.1\..*(query|dense)"},
        {"target_modules": r"bert\.encoder\.layer\.\d\.attention\.self\.(?!key)\w+y"},
        {
            "target_modules": r".*\.layer\.1\..*",
            "exclude_modules": r".*(attention|self|put|intermediate|dropout|LayerNorm|fn)",
        },
        {"target_modules": r".*attention\.output\..*", "exclude_modules": ["LayerNorm", "dropout"]},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-Linear"},
        {"target_modules": "all-linear", "exclude_modules": ["dense"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.encoder\.layer\.0\..*"},
        {"target_modules": "all-linear", "modules_to_save": ["cls"]},
        {"target_modules": ["attention.output.dense", "key"], "exclude_modules": ["0.attention.self.key"]},
        {"target_modules": ["query", "dense"], "exclude_modules": r"cls\..*"},
        {"target_modules": ["dense"], "modules_to_save": ["transform"]},
        {"target_modules": ["dense"], "modules_to_save": ["intermediate", "transform.dense"]},
        {**FEW, "layers_to_transform": 0},
        {**FEW, "layers_to_transform": [1]},
        {**FEW, "layers_to_transform": [0, 1]},
        {**FEW, "layers_to_transform": []},
        {"target_modules": ["dense"], "layers_to_transform": [0]},  # the head's has no index
        {"target_modules": [*FULL_NAMES[:2], "value"], "layers_to_transform": 1},  # full names have them all
        {**FEW, "layers_to_transform": 1, "layers_pattern": "layer"},
        {**FEW, "layers_to_transform": [0], "layers_pattern": ["encoder.layer", "layer"]},
        {**FEW, "layers_to_transform": [0], "layers_pattern": "l.y[a-e]r"},
        {**FEW, "layers_to_transform": [0], "layers_pattern": ""},
        {**FEW, "layers_to_transform": [0], "layers_pattern": []},
        {"target_modules": ["dense"], "layers_to_transform": [0], "exclude_modules": ["0.output.dense"]},
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["query", "position_embeddings", "token_type_embeddings"]},
        {"target_modules": r".*_embeddings", "exclude_modules": ["token_type_embeddings"]},
    ),
    *rows(
        "bert classification",
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
        {"target_modules": ["pooler.dense", "word_embeddings"], "modules_to_save": ["classifier"]},
        {**FEW, "layers_to_transform": [0]},
    ),
    *rows(
        "distilbert masked-lm",
        {"target_modules": ["q_lin", "v_lin"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["lin1", "vocab_transform"]},
        {"target_modules": ["q_lin"], "layers_to_transform": 1, "layers_pattern": "transformer.layer"},
        {"target_modules": r".*\.1\..*lin\d?", "exclude_modules": ["k_lin"]},
        {"target_modules": ["word_embeddings", "position_embeddings", "q_lin"]},
    ),
    *rows(
        "distilbert classification",
        {"target_modules": ["q_lin", "v_lin", "lin1"]},
        {"target_modules": "all-linear", "modules_to_save": ["pre_classifier"]},
        {"target_modules": "all-linear", "exclude_modules": ["pre_classifier", "out_lin"]},
    ),
    *rows(
        "roberta masked-lm",
        {"target_modules": "all-linear", "exclude_modules": ["lm_head.dense"]},
        {"target_modules": ["lm_head.dense"]},
        {"target_modules": ["word_embeddings", "key"], "layers_to_transform": None},
    ),
    *rows("roberta classification", {}, {"target_modules": "all-linear"}, {"target_modules": ["query", "dense"]}),
    *rows("electra masked-lm", {}, {"target_modules": "all-linear"}, {"target_modules": ["embeddings_project"]}),
    *rows("electra classification", {"target_modules": "all-linear"}, {"target_modules": ["dense", "key"]}),
    *rows(
        "albert masked-lm",
        FEW,
        {"target_modules": "all-linear"},
        {**FEW, "layers_to_transform": [1]},  # the group, as the first number
        {**FEW, "layers_to_transform": [1], "layers_pattern": ["albert_layers"]},
    ),
    *rows("albert classification", {"target_modules": "all-linear"}, {"target_modules": ["pooler", "ffn"]}),
    *rows(
        "bert masked-lm",
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["key"], "layers_to_transform": 1, "layers_pattern": "layer"},
        {"target_modules": ["word_embeddings", "query"]},
        method="hira",
    ),
    *rows("roberta classification", {}, method="hira"),
    *rows("bert masked-lm", {}, {"target_modules": "all-linear"}, method="ia3"),
    *rows("roberta classification", {}, {"target_modules": ["key"], "exclude_modules": r".*0.*"}, method="ia3"),
    *rows("bert classification", {}, method="adalora"),
    *rows("roberta masked-lm", {}, method="adalora"),
]

REFUSED = [
    *rows(
        "bert masked-lm",
        {"target_modules": ["q_lin", "v_lin"]},
        {"target_modules": ["uery"]},
        {"target_modules": "query"},
        {"target_modules": ["all-linear"]},
        {"target_modules": []},
        {"target_modules": ["pooler"]},  # for masked LM, there is none
        {"target_modules": ["attention"]},  # a block
        {"target_modules": ["LayerNorm"]},
        {"target_modules": r".*layer\.1\..*"},  # blocks besides layers
        {"target_modules": r".*embeddings"},
        {**FEW, "exclude_modules": r".*(query|value)"},
        {"target_modules": "all-linear", "exclude_modules": r".*"},
        {"target_modules": ["transform.dense"], "modules_to_save": ["cls"]},
        {**FEW, "layers_to_transform": 7},
        {**FEW, "layers_to_transform": [-1]},
        {**FEW, "layers_to_transform": [0], "layers_pattern": "layers"},
        {**FEW, "layers_pattern": "layer"},
        {"target_modules": "all-linear", "layers_to_transform": 0},
        {"target_modules": ".*query", "layers_to_transform": [0]},
        {"target_modules": ".*query", "layers_pattern": "layer"},
    ),
    *rows("distilbert classification", {"target_modules": ["pre_classifier"]}),
    *rows("roberta classification", {"target_modules": ["out_proj"]}),
    *rows("bert masked-lm", {"target_modules": ["quary"]}, method="hira"),
]

# What targets.py says it refuses and PEFT does not: options of which a part has no effect.
STRICTER = [
    *rows(
        "bert masked-lm",
        {"target_modules": ["query", "quary"]},
        {"target_modules": ["query", "decoder"]},  # tied
        {**FEW, "exclude_modules": ["key", "kay"]},
        {**FEW, "exclude_modules": ["attention"]},  # a block
        {**FEW, "layers_to_transform": [0, 7]},
        {"target_modules": ["query", "transform.dense"], "layers_to_transform": [0]},
        {**FEW, "layers_to_transform": [0], "layers_pattern": ["layer", "h"]},
        {"target_modules": FULL_NAMES[:1], "layers_to_transform": [1]},
        {**FEW, "layers_to_transform": [], "layers_pattern": "layer"},
    ),
    *rows("roberta classification", {"target_modules": ["query", "out_proj"]}),
    *rows("bert masked-lm", {**FEW, "layers_pattern": "layer"}, method="hira"),  # LoRA's config refuses it
]


@pytest.mark.parametrize(("model_type", "task", "method", "arguments"), SAME)
def test_the_layers_are_those_that_peft_adapts(tiny_models, model_type, task, method, arguments):
    peft_adapted, peft_whole = peft_layers(model_type, task, method, arguments)
    adapted, whole = our_layers(tiny_models, model_type, task, method, arguments)
    assert adapted == peft_adapted
    assert whole == peft_whole


@pytest.mark.parametrize(("model_type", "task", "method", "arguments"), REFUSED)
def test_what_peft_refuses_is_refused(tiny_models, model_type, task, method, arguments):
    with pytest.raises((ValueError, TypeError)):
        peft_layers(model_type, task, method, arguments)
    with pytest.raises(InputError) as error:
        our_layers(tiny_models, model_type, task, method, arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("model_type", "task", "method", "arguments"), STRICTER)
def test_what_has_no_effect_in_peft_is_refused(tiny_models, model_type, task, method, arguments):
    assert peft_layers(model_type, task, method, arguments)[0]
    with pytest.raises(InputError):
        our_layers(tiny_models, model_type, task, method, arguments)


def test_all_linear_spares_distilbert_s_whole_head_where_peft_fails(tiny_models):
    """PEFT 0.21 adapts `pre_classifier`, unless it is named, and then cannot train it whole; here that is never adapted."""
    row = ("distilbert", "classification", "lora", {"target_modules": "all-linear"})
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        peft_layers(*row)
    adapted, whole = our_layers(tiny_models, *row)
    assert whole == {"pre_classifier", "classifier"}
    named = peft_layers(*row[:3], {"target_modules": "all-linear", "modules_to_save": ["pre_classifier"]})[0]
    assert adapted == named


def test_a_regular_expression_chooses_among_the_sites_only(tiny_models):
    """The tied decoder is none, and PEFT adapts it; LayerNorm is none, and PEFT raises."""
    expression = r".*(query|predictions\.decoder)"
    ours, _ = our_layers(tiny_models, "bert", "masked-lm", "lora", {"target_modules": expression})
    theirs, _ = peft_layers("bert", "masked-lm", "lora", {"target_modules": expression})
    assert theirs - ours == {"cls.predictions.decoder"}
    assert ours < theirs
    expression = r".*attention\.output\.(dense|LayerNorm)"
    ours, _ = our_layers(tiny_models, "bert", "masked-lm", "lora", {"target_modules": expression})
    assert ours == {name for name in FULL_NAMES if name.endswith("dense")}
    with pytest.raises(ValueError, match=r"LayerNorm.* is not supported"):
        peft_layers("bert", "masked-lm", "lora", {"target_modules": expression})


def test_a_full_name_is_taken_whatever_its_index_and_the_length_of_the_list(tiny_models):
    """PEFT shortens lists of 20 names and more to suffixes, to which `layers_to_transform` then applies."""
    arguments = {"target_modules": [*FULL_NAMES[:3], "key"], "layers_to_transform": [1]}
    ours, _ = our_layers(tiny_models, "bert", "masked-lm", "lora", arguments)
    assert ours == peft_layers("bert", "masked-lm", "lora", arguments)[0] == {*FULL_NAMES[:3], FULL_NAMES[5]}
    long = {**arguments, "target_modules": [*FULL_NAMES[:3], "key", *(f"none{i}" for i in range(20))]}
    assert peft_layers("bert", "masked-lm", "lora", long)[0] == {f"{ENCODER}.1.attention.self.key"}


@pytest.mark.parametrize(
    ("method", "mapping"),
    [
        *((name, "LORA") for name in ("lora", "loha", "lokr")),
        *((name, name.upper()) for name in ("hira", "vera", "adalora", "ia3", "shira", "supertuning")),
        ("ln-tuning", "LNTUNING"),
    ],
)
def test_defaults_are_peft_s_where_it_has_them(method, mapping):
    from peft.utils import constants

    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{mapping}_TARGET_MODULES_MAPPING")
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for model_type in ("bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert"):
        ours = default_targets(method, model_type)
        assert list(ours) == theirs.get(model_type, list(ours))
        assert list(default_feedforward(model_type)) == feedforward.get(
            model_type, list(default_feedforward(model_type))
        )


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra", "albert"])
@pytest.mark.parametrize("method", ["lora", "adalora", "ia3"])
def test_every_default_matches_layers_of_its_model(tiny_models, model_type, method):
    for task in ("masked-lm", "classification"):
        assert our_layers(tiny_models, model_type, task, method, {})[0]


@pytest.mark.parametrize(
    "patterns",
    [
        {"query": 4},
        {"0.attention.self.query": 8, "query": 4, "key": 16},
        {r".*layer\.1\..*": 3, "query": 4},
        {f"^{ENCODER}.0.attention.self.query": 5, "attention.*": 6},
        {"self": 7},
    ],
)
def test_rank_patterns_are_read_as_peft_reads_them(patterns):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that "self" has no effect
        config = peft.LoraConfig(r=2, target_modules=["query", "key", "dense"], rank_pattern=patterns)
        model = peft.inject_adapter_in_model(config, deepcopy(torch_model("bert", "masked-lm")))
    ranks = {name: module.r["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert len(ranks) == 11
    assert {name: pattern_value(patterns, name.replace(".", "/"), 2) for name in ranks} == ranks


def our_layers(tiny_models, model_type, task, method, arguments):
    """The dotted names of the adapted layers, and of the linear layers that train whole."""
    sites, leaves = our_model(tiny_models, model_type, task)
    options = {"target_modules": list(default_targets(method, model_type)), **arguments}
    # PEFT trains a classifier's head whole; every task's `modules_to_save` come on top.
    names = [
        *(family_of(model_type).classifier_heads if task == "classification" else ()),
        *options.pop("modules_to_save", ()),
    ]
    whole = {leaf.rpartition("/")[0] for leaf in match_modules(leaves, names)}
    chosen = match_targets(sites, fully_trained_layers=whole, **options)
    linear = {path for path in whole if path in sites}
    return {path.replace("/", ".") for path in chosen}, {path.replace("/", ".") for path in linear}


@functools.cache
def our_model(tiny_models, model_type, task):
    """A tiny model's sites and leaf paths."""
    model = tiny_models("bert" if model_type in KIN else model_type, task, config=KIN.get(model_type))
    return model.sites(), list(leaf_paths(model.params))


def peft_layers(model_type, task, method, arguments):
    """The same of the torch model in PEFT's hands."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    with warnings.catch_warnings():
        # PEFT warns of tied embeddings and of exclusions without effect; what it does is compared here.
        warnings.simplefilter("ignore")
        task_type = "SEQ_CLS" if task == "classification" else None
        config = CONFIGS[method](**OPTIONS[method], task_type=task_type, **deepcopy(arguments))
        model = peft.get_peft_model(deepcopy(torch_model(model_type, task)), config).base_model.model
    modules = dict(model.named_modules())
    # A tied decoder trains whole with its head in PEFT; ours is no site.
    whole = {
        name.replace(".modules_to_save.default", "")
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and ".modules_to_save." in name and not name.endswith("decoder")
    }
    return {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}, whole


@functools.cache
def torch_model(model_type, task):
    """The torch twin of a tiny model; PEFT gets copies."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForMaskedLM
    sizes = {**tiny.CONFIGS["bert"], **KIN[model_type]} if model_type in KIN else tiny.CONFIGS[model_type]
    return auto.from_config(AutoConfig.for_model(**sizes))
