"""Encoder families: the one place that knows architectures, each against its model, and what happens without one."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

import jaxpeft
from jaxpeft.adapters import LnTuning
from jaxpeft.errors import InputError
from jaxpeft.families import FAMILIES, Family, family_of, known, required
from jaxpeft.interop.peft import FORMATS
from jaxpeft.models.attention import attention_dropout, check_packing, choose_flash, module_overrides, position_taps
from jaxpeft.models.build import Model, build_abstract_model
from jaxpeft.models.last_layer import last_layer
from jaxpeft.targets import default_feedforward, default_targets, match_modules, match_targets
from jaxpeft.trees import below, leaf_paths, under

PACKAGE = Path(jaxpeft.__file__).parent
# Architectures of transformers 4.57's Flax mappings that have no family, and names that may come.
OTHERS = ("bart", "mbart", "camembert", "deberta", "deberta-v2", "modernbert", "mpnet", "gpt2")

# Those that `tiny` does not have, as BERT with a difference.
KIN = {
    "albert": {"model_type": "albert", "embedding_size": 16, "num_hidden_groups": 2},
    "big_bird": {"model_type": "big_bird", "attention_type": "original_full"},
    "roformer": {"model_type": "roformer", "embedding_size": 32},
}
# Rates that transformers' configs have for heads that are not used here.
OTHER_HEADS = {"qa_dropout", "summary_first_dropout", "summary_last_dropout"}


def named(tree):
    """The string constants of a module, less docstrings and the texts beside attributes."""
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose
    }


def naming(source):
    """Line and text of each string in `source` that is a `model_type`, or a path or a pattern that begins with one."""
    types = "|".join(sorted(map(re.escape, {*FAMILIES, *OTHERS})))
    return {(line, text) for line, text in named(ast.parse(source)) if re.match(rf"({types})([/.:].*)?$", text)}


def test_no_other_file_names_a_model_type():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "families"]
    assert len(files) > 100
    assert {path.name: found for path in files if (found := naming(path.read_text()))} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('if config.model_type == "distilbert": x()', {(1, "distilbert")}),
        ('TABLE = {"xlm-roberta": 1}\nNAMES = ("electra", "other")', {(1, "xlm-roberta"), (2, "electra")}),
        ('path = f"bert/encoder/{i}"', {(1, "bert/encoder/")}),
        ('if "roberta" in config.model_type: x()', {(1, "roberta")}),
        ('"""bert"""\nX = 1\n"""albert"""\ndef f():\n    """roberta"""', set()),
        ('CITATION = "BERT: Devlin et al. 2018"\nTEXT = "a bare BERT\'s model"', set()),
    ],
)
def test_a_name_is_found_in_code_and_not_in_prose(source, expected):
    assert naming(source) == expected


def load(tiny_models, model_type, task="masked-lm", **options):
    known_to_tiny = model_type in tiny.CONFIGS
    return tiny_models(model_type if known_to_tiny else "bert", task, config=KIN.get(model_type), **options)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("task", ["masked-lm", "classification", "sentence-embeddings"])
def test_what_a_family_names_is_in_its_model(tiny_models, model_type, task):
    model, family = load(tiny_models, model_type, task), FAMILIES[model_type]
    leaves, sites = list(leaf_paths(model.params)), model.sites()
    prefix, last = model.base_prefix, model.config.num_hidden_layers - 1

    assert (family.model_type, model.family) == (model_type, family)
    assert any(under(leaf, [prefix]) for leaf in leaves)
    assert (prefix == "") == (task == "sentence-embeddings")
    for targets in family.default_targets.values():
        assert match_targets(sites, list(targets))
    assert set(default_feedforward(model_type)) < set(default_targets("ia3", model_type))
    assert [site.kind for site in match_targets(sites, [family.word_embeddings]).values()] == ["embedding"]
    norms = {leaf.removesuffix("/scale").replace("/", ".") for leaf in leaves if leaf.endswith("/scale")}
    modules = {layer.replace("/", ".") for layer in (leaf.rpartition("/")[0] for leaf in leaves)}
    assert {module for module in modules if re.fullmatch(family.norms, module)} == norms
    if task == "classification":
        outside = [leaf for leaf in leaves if not under(leaf, [prefix])]
        assert match_modules(outside, family.classifier_heads) == set(outside)
    if attention := family.attention:
        for number in range(last + 1):
            assert any(under(site, [below(prefix, attention.path.format(number=number))]) for site in sites)
        assert 0 < attention_dropout(model) < 1
    if family.after_attention:
        assert any(leaf.startswith(f"{model.behind_attention}/") for leaf in leaves)
        assert not [
            leaf for leaf in leaves if under(leaf, [below(prefix, family.after_attention.format(last=last + 1))])
        ]
    for path in last_layer(model, lambda x: x):
        assert any(leaf.startswith(f"{path}/") for leaf in leaves)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_dropout_rate_of_the_base_is_set(tiny_models, model_type):
    model = load(tiny_models, model_type, "classification", dropout=0.25)
    rates = {name for name in model.module.config.to_dict() if "drop" in name} - OTHER_HEADS
    assert {name: getattr(model.module.config, name) for name in rates} == dict.fromkeys(rates, 0.25)


def test_an_architecture_without_a_family_is_refused_where_one_is_needed():
    """Nothing is guessed; what only saves work is left out."""
    config = SimpleNamespace(model_type="bart", num_hidden_layers=2, tie_word_embeddings=True)
    model = Model(SimpleNamespace(dtype="bfloat16", config=config), config, {}, "masked-lm", None)
    unknown = family_of("bart")
    assert unknown == Family("bart")
    assert (model.behind_attention, last_layer(model, lambda x: x)) == (None, {})
    assert default_targets("lora", "bart") == default_feedforward("bart") == ()
    tpu = SimpleNamespace(platform="tpu")
    assert choose_flash("auto", model, tpu, lambda scores: scores) is None
    names = "it is known for bert, electra, .*distilbert$"
    for call, message in (
        (lambda: choose_flash("flash", model, tpu, lambda scores: scores), "model.attention 'flash': .*the attention"),
        (lambda: check_packing(model), "data.packing: jaxpeft does not know the attention of 'bart'"),
        (lambda: module_overrides(model, None, packed=True, training=False), "the attention"),
        (lambda: position_taps(model, None), "the attention"),
        (
            lambda: required(unknown, "word_embeddings", "prompt-tuning"),
            "prompt-tuning: .*the word embeddings of 'bart'",
        ),
    ):
        with pytest.raises(InputError, match=f"{message}.*{names}"):
            call()
    norms = FORMATS["ln-tuning"]()
    with pytest.raises(InputError, match=f"ln-tuning without target_modules.* the norms of 'bart'.*{names}"):
        norms.for_family(LnTuning(), unknown)
    assert norms.for_family(LnTuning(["LayerNorm"]), unknown) == LnTuning(["LayerNorm"])


def test_a_dropout_rate_needs_a_family(tiny_models, monkeypatch):
    monkeypatch.delitem(FAMILIES._places, "roformer")
    assert load(tiny_models, "roformer").model_type == "roformer"
    with pytest.raises(InputError, match=r"model\.dropout 0\.5: jaxpeft does not know the dropout rates of 'roformer'"):
        load(tiny_models, "roformer", dropout=0.5)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("task", ["masked-lm", "classification"])
def test_a_model_with_a_decoder_is_refused(task):
    from transformers import BartConfig

    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=tiny.VOCABULARY)
    with pytest.raises(InputError, match="'bart' needs decoder_input_ids: only encoders can be used"):
        build_abstract_model(config, task)


def test_a_family_is_one_file_and_one_line(tmp_path, monkeypatch):
    (tmp_path / "toy_family.py").write_text(
        '"""A toy."""\nfrom jaxpeft.families.base import Family\n\n'
        'TOY = Family("toy", {"attention_qv": ("q", "v")}, word_embeddings="tokens")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FAMILIES._places, "toy", "toy_family:TOY")
    try:
        assert default_targets("lora", "toy") == ("q", "v")
        assert default_targets("ia3", "toy") == ()
        assert known("word_embeddings")["toy"] == "tokens"
        assert "toy" not in known("attention")
    finally:
        sys.modules.pop("toy_family", None)


def test_every_family_cites_a_paper_of_its_own():
    papers = [family.citation for family in FAMILIES.values()]
    assert all(re.fullmatch(r".+: .+ et al\. \d{4}, arXiv \d{4}\.\d{5}", paper) for paper in papers), papers
    assert len(set(papers)) == len(papers)
    assert family_of("unknown").citation is None
