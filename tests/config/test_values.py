"""Values that are checked when a configuration is made in Python, as flags are by the parser; and old names."""

from dataclasses import replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from jaxpeft.adapters import AdaLora, Lora
from jaxpeft.comparison.grid import CompareConfig
from jaxpeft.config import (
    AdapterConfig,
    ContextualConfig,
    DataConfig,
    EmbeddingConfig,
    ModelConfig,
    PruningConfig,
    RunConfig,
    TrainingConfig,
)
from jaxpeft.config.files import run_config
from jaxpeft.errors import InputError
from jaxpeft.models.attention import choose_flash
from jaxpeft.models.build import load_model
from jaxpeft.training.optimizer import learning_rate_schedule

DATA = DataConfig(name="python-docs")
UNKNOWN = {
    "weights": (lambda: ModelConfig(weights="pretraned"), "model.weights is 'pretraned'; .* pretrained, random"),
    "dtype": (lambda: ModelConfig(dtype="float16"), "model.dtype is 'float16'; .* float32, bfloat16"),
    "attention": (lambda: ModelConfig(attention="flush"), "model.attention is 'flush'; .* auto, dense, flash"),
    "schedule": (lambda: TrainingConfig(schedule="cosin"), "training.schedule is 'cosin'; .* linear, cosine, constant"),
    "bias": (lambda: AdapterConfig(bias="some"), "adapter.bias is 'some'; .* none, all, lora_only, None"),
    "selection": (lambda: ContextualConfig(selection="best"), "contextual.selection is 'best'; .* svd, oracle, random"),
    "pooling": (lambda: EmbeddingConfig(pooling="max"), "embedding.pooling is 'max'; .* mean, cls"),
    "prompt": (lambda: AdapterConfig(prompt_tuning_init="text"), "adapter.prompt_tuning_init is 'text'; .*TEXT"),
}
SECTIONS = {
    ModelConfig: "model",
    TrainingConfig: "training",
    AdapterConfig: "adapter",
    PruningConfig: "pruning",
    ContextualConfig: "contextual",
    EmbeddingConfig: "embedding",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_value_that_no_flag_could_have_is_refused(name):
    make, message = UNKNOWN[name]
    section = make()
    with pytest.raises(InputError, match=message):
        RunConfig(data=DATA, **{SECTIONS[type(section)]: section})


def test_no_section_with_fixed_choices_is_left_out():
    hints = {name: hint for name, hint in get_type_hints(RunConfig).items() if hasattr(hint, "__dataclass_fields__")}
    with_choices = {
        name
        for name, section in hints.items()
        for hint in get_type_hints(section).values()
        if any(get_origin(part) is Literal for part in (hint, *get_args(hint)))
    }
    assert with_choices == set(SECTIONS.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_model("x", "masked-lm", weights="randon"), "weights is 'randon'"),
        (lambda: Lora(bias="some"), "bias is 'some'"),
        (lambda: AdaLora(bias="some"), "bias is 'some'"),
        (lambda: choose_flash("flush", None, None, None), "model.attention is 'flush'"),
        (lambda: learning_rate_schedule(1e-3, 10, 2, "step"), "training.schedule is 'step'"),
    ],
)
def test_functions_refuse_it_too(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_old_names_are_read():
    values = {"data": {"name": "python-docs"}, "training": {"steps_per_dispatch": 3}}
    config = run_config(values, "a file")
    assert config.training.micro_steps_per_dispatch == 3
    assert "steps_per_dispatch" not in config.resolved()["training"]
    assert config == RunConfig(data=DATA, training=TrainingConfig(micro_steps_per_dispatch=3))
    task = {"tasks": {"x": {"data": {"name": "python-docs"}}}, "methods": {"lora": {"learning_rates": [1e-3]}}}
    assert CompareConfig(**task, cost_updates=25) == CompareConfig(**task, cost_steps=25)


def test_an_old_name_beside_the_new_one():
    assert TrainingConfig(micro_steps_per_dispatch=3, steps_per_dispatch=3).micro_steps_per_dispatch == 3
    with pytest.raises(InputError, match="micro_steps_per_dispatch is 4, and steps_per_dispatch, its old name, is 3"):
        TrainingConfig(micro_steps_per_dispatch=4, steps_per_dispatch=3)
    # A configuration that was read once can be changed.
    assert replace(TrainingConfig(steps_per_dispatch=3), batch_size=2).micro_steps_per_dispatch == 3
