"""The shapes that preflight lowers are those of a run: of its model, adapters, state and batches."""

import contextlib
import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
import tiny_runs
from tiers import slow

from jaxpeft.config import AdapterConfig, DataConfig, ModelConfig, PruningConfig, RunConfig, TrainingConfig
from jaxpeft.config.parsing import parse_run
from jaxpeft.data import Split, Splits, classification_data, masked_lm_data, sentence_pair_data
from jaxpeft.errors import InputError
from jaxpeft.models import build
from jaxpeft.models.tokenizers import load_tokenizer
from jaxpeft.preflight.abstract_run import abstract_run, lower_evaluation, lower_training
from jaxpeft.preflight.collectives import traffic
from jaxpeft.quantization import Quantization, quantize, quantized_shape
from jaxpeft.runs.base_model import _options
from jaxpeft.runs.schedule import make_plan
from jaxpeft.runs.setup import make_optimizer
from jaxpeft.tasks.classification import Classification
from jaxpeft.tasks.masked_lm import MaskedLM
from jaxpeft.tasks.regression import Regression
from jaxpeft.tasks.sentence_embeddings import SentenceEmbeddings
from jaxpeft.training.dropout import dropout_key
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import init_state
from jaxpeft.trees import constants_of


@pytest.fixture
def config(tmp_path):
    """A function of adapter options, `model` and `pruning` options: a run on a tiny random BERT of one layer."""
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIGS["bert"], "num_hidden_layers": 1}))

    def make(model=(), pruning=(), training=(), **adapter):
        return RunConfig(
            model=ModelConfig(name=str(tmp_path / "config.json"), weights="random", **dict(model)),
            data=DataConfig(name="python-docs", max_length=16),
            adapter=AdapterConfig(**{"rank": 2, **adapter}),
            pruning=PruningConfig(**dict(pruning)),
            training=TrainingConfig(batch_size=8, num_steps=1000, **dict(training)),
        )

    return make


def described(tree):
    """Paths, shapes and dtypes of a tree."""
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def real(config):
    """`(frozen, state)` as `runs.train.run` makes them."""
    with mock.patch.object(build, "_draw", tiny.draw):
        model = build.load_model(config.model.name, "masked-lm", **_options(config.model, MaskedLM(), config.adapter))
    adapted = tiny.prepared(config, model)
    plan = make_plan(config.training, config.pruning, batches_per_epoch=10, metric="loss", method=adapted.method)
    kinds = {"pruned": bool(config.pruning.sparsity), "allocated": config.adapter.method == "adalora"}
    if config.pruning.schedule == "rigl":
        kinds["redrawn"] = constants_of(adapted.frozen)
    state = init_state(
        adapted.adapters,
        make_optimizer(config.training, adapted.method, model, plan.learning_rate),
        dropout_key(0),
        **kinds,
    )
    return adapted.frozen, state


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True, "model": {"dtype": "bfloat16"}},
        {"model": {"quantization": "nf4"}, "training": {"accumulation_steps": 2}},
        pytest.param(
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}, "modules_to_save": ["cls"]}, marks=slow
        ),
        {"method": "hira", "model": {"quantization": "int8"}, "pruning": {"sparsity": 0.5}},
        {"method": "adalora", "rank": None},
        pytest.param({"method": "vera"}, marks=slow),
        {"method": "prompt-tuning", "num_virtual_tokens": 4},
        pytest.param({"method": "shira", "rank": 1, "mask_type": "block"}, marks=slow),
        {"method": "shira", "rank": 1, "pruning": {"schedule": "rigl"}},
        pytest.param({"method": "s2ft", "channels": 4, "model": {"quantization": "nf4"}}, marks=slow),
        pytest.param({"method": "full"}, marks=slow),
    ],
    ids=lambda options: "-".join(map(str, [options.get("method", "lora"), *options]))[:40],
)
def test_a_run_s_shapes_are_a_run_s(config, options, standard_promotion):
    run = abstract_run(config(**options), data_parallel())
    frozen, state = real(config(**options))
    assert described(run.frozen) == described(frozen)
    assert described(run.state) == described(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((run.frozen, run.state)))


@pytest.mark.slow
def test_a_choice_from_data_does_not_change_the_shapes(config):
    for method, choice in (
        ({"method": "shira"}, {"mask_type": "gradient"}),
        ({"method": "s2ft"}, {"selection": "activation"}),
    ):
        options = {**method, "rank": 1, **({"channels": 4} if "selection" in choice else {})}
        chosen = abstract_run(config(**options, **choice), data_parallel())
        assert described(chosen.frozen) == described(abstract_run(config(**options), data_parallel()).frozen)


def test_ranks_that_data_chooses_are_refused(config):
    with pytest.raises(InputError, match=r"eva.*set it and adapter\.eva_config to null"):
        abstract_run(config(init_lora_weights="eva"), data_parallel())


@pytest.mark.parametrize("scheme", [Quantization("nf4"), Quantization("fp4", 128, False), Quantization("int8")])
@pytest.mark.parametrize("shape", [(32, 48), (33, 7)])
def test_quantised_shapes_are_those_of_quantised_kernels(scheme, shape):
    kernel = quantize(tiny.normal(0, *shape), **dataclasses.asdict(scheme))
    assert described(quantized_shape(shape, scheme)) == described(kernel)
    assert jax.tree.structure(quantized_shape(shape, scheme)) == jax.tree.structure(kernel)


def test_batches_are_those_of_the_data(config):
    tokenizer = load_tokenizer(tiny_runs.package_model())
    texts = ["The object must be an instance of the class."] * 40
    run = abstract_run(config(), data_parallel())
    data = masked_lm_data(texts, tokenizer, length=16, batch_size=8, ratio=run.rows.mask_ratio, seed=0)
    dummies = run.training_data(8)
    assert described(dict(dummies.draw(0))) == described(dict(data.draw(0)))
    assert described({name: rows[:8] for name, rows in data.device_data.items()}) == described(
        dict(dummies.device_data)
    )
    assert described(run.task.batch_shapes(run.rows, 8, 16)) == described(dict(data.train_batch(0)))
    for labels, task in ((np.zeros(40, np.int32), Classification(2)), (np.zeros(40, np.float32), Regression(1))):
        data = classification_data(
            texts, None, labels, tokenizer, max_length=16, batch_size=8, seed=0, bucket_lengths=(16,)
        )
        assert described(task.batch_shapes(run.rows, 8, 16)) == described(dict(data.train_batch(0)))
        assert task.lengths(run.rows) == (16,)
    for third in (None, texts):
        split = Split(texts, texts, negatives=third)
        data = sentence_pair_data(split, tokenizer, max_length=16, batch_size=8, seed=0, bucket_lengths=(16,))
        task = SentenceEmbeddings().configured({}, Splits(split, split, None, None, None, ""))
        assert described(task.batch_shapes(run.rows, 8, 16)) == described(dict(data.train_batch(0)))
    assert run.lengths == (16,)


def assert_sends_gradients_alone(run, batch_size, length):
    """The whole of data parallelism's cost: batches are assembled by each device for itself."""
    sent = traffic(lower_training(run, batch_size, length).compile().as_text())
    assert 0 < sent.array_bytes <= run.gradient_bytes
    assert 0 < sent.scalar_bytes <= 16  # the loss, its weight, the count of tokens


def test_chips_exchange_no_more_than_the_adapters_gradients(config):
    run = abstract_run(config(), data_parallel())
    assert_sends_gradients_alone(run, 8, 16)
    sent = traffic(lower_evaluation(run, 8, 16).compile().as_text())
    assert sent.array_bytes == 0


def test_packed_rows_are_as_many_as_the_texts_ask_for(tmp_path_factory):
    """How many is in the data, so that is read; four devices share them."""
    flags = (
        "--task classification --model.name base --data.train_file labels.tsv --data.packing true --data.max_length 32"
    )
    with contextlib.chdir(tiny_runs.workplace(tmp_path_factory)):
        run = abstract_run(parse_run([*flags.split(), "--training.batch_size", "32"], "preflight")(), data_parallel())
        assert run.training_shape(32, 32)[0] < 32
        batch = run.training_data(32).train_batch(0)
        assert (len(batch["segments"]), batch["segments"].shape[1]) == run.training_shape(32, 32)
        assert_sends_gradients_alone(run, 32, 32)


@pytest.mark.slow
def test_a_program_of_every_bucket_takes_the_run_s_own_texts(tmp_path_factory):
    flags = "--task classification --model.name base --data.train_file labels.tsv --data.max_length 32 --data.bucket_lengths [8,16]"
    with contextlib.chdir(tiny_runs.workplace(tmp_path_factory)):
        run = abstract_run(parse_run([*flags.split(), "--training.batch_size", "8"], "preflight")(), data_parallel())
    for length in run.lengths:
        inputs = lower_training(run, 8, length).in_avals[0]
        tokens = run.training_data(8).device_data["input_ids"].shape
        assert inputs[2]["input_ids"].shape == tokens
        assert inputs[3]["columns"].shape == (run.plan.micro_steps_per_dispatch, length)
        assert_sends_gradients_alone(run, 8, length)
