"""Attention in the place of the model's own: texts packed into rows answer as by themselves; flash attention where it can be."""

from functools import partial
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest
import tiny
from tiers import slow_but

from jaxpeft.adapters import Hira, Lora
from jaxpeft.data import ClassificationData, Encoded, PackedData
from jaxpeft.errors import InputError
from jaxpeft.families import family_of
from jaxpeft.models import attention
from jaxpeft.models.attention import Flash, check_packing, choose_flash
from jaxpeft.quantization import Quantization
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import data_parallel

H200 = SimpleNamespace(platform="gpu", compute_capability="9.0")
TPU = SimpleNamespace(platform="tpu")


def texts(model, rows=22, *, texts_a_batch=8):
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 15, rows)
    ids = rng.integers(5, tiny.VOCABULARY, lengths.sum()).astype(np.int32)
    types = (rng.random(lengths.sum()) < 0.5).astype(np.int32) * (getattr(model.config, "type_vocab_size", 1) > 1)
    encoded = Encoded(ids, types.astype(np.int32), np.cumsum([0, *lengths]), 0, 16, model.config.pad_token_id)
    return ClassificationData(encoded, rng.integers(0, 2, rows).astype(np.int32), texts_a_batch, (16,), seed=5)


def both_ways(data, devices, step=0):
    """A packed batch, and the same texts a row each, in the same order."""
    packed = PackedData(data, 24, devices)
    draw = {"rows": packed.draw(step)["rows"], "columns": np.arange(16, dtype=np.int32)}
    return packed.train_batch(step), data.assemble(data.device_data, draw, np)


NF4 = {"quantization": Quantization("nf4")}
TRAINED = {
    "bert": ("bert", Hira(rank=4), {"gradient_checkpointing": True}),
    "distilbert": ("distilbert", Lora(rank=4), NF4),
    "roberta": ("roberta", Lora(rank=4), {}),
}


def answers(model, method, data):
    """`(adapters, batch) → logits` of a model with an adapter, and its packed and unpacked batch."""
    frozen, adapters = tiny.adapted(model, method)
    objective = Objective(model, method, tiny.task_of(model))
    packed, alone = both_ways(data, 2, step=2)
    assert len(packed["input_ids"]) < len(alone["labels"])
    assert (packed["weights"] == 0).any()
    np.testing.assert_array_equal(packed["labels"], alone["labels"])
    return objective, frozen, adapters, packed, alone


@pytest.mark.parametrize("model_type", slow_but(tiny.CONFIGS, "bert", "distilbert"))
def test_packed_texts_answer_as_by_themselves(tiny_models, model_type):
    model = tiny_models(model_type, "classification")
    objective, frozen, adapters, packed, alone = answers(model, Lora(rank=4), texts(model))
    run = jax.jit(lambda batch: objective.logits(frozen, adapters, {}, batch))
    real = packed["weights"] > 0
    np.testing.assert_allclose(run(packed)[real], run(alone)[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(TRAINED, "bert"))
def test_packed_texts_give_the_same_gradients(tiny_models, name):
    model_type, method, options = TRAINED[name]
    model = tiny_models(model_type, "classification", **options)
    objective, frozen, adapters, packed, alone = answers(model, method, texts(model))

    @jax.jit
    def gradients(adapters, batch):
        return jax.grad(lambda adapters: objective.loss(objective.logits(frozen, adapters, {}, batch), batch)[0])(
            adapters
        )

    found, expected = (gradients(adapters, batch) for batch in (packed, alone))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_dropout_in_packed_rows(tiny_models):
    """It is the base's own: off in evaluation, and another key gives another answer."""
    model = tiny_models("distilbert", "classification", dropout=0.5)
    objective, frozen, adapters, packed, _ = answers(model, Lora(rank=4), texts(model))
    run = jax.jit(lambda rng: objective.logits(frozen, adapters, {}, packed, rng))
    one, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.usefixtures("compiled_afresh")
def test_devices_answer_their_own_texts(tiny_models):
    """Rows and texts of a batch are split over four devices alike: in the forward pass nothing is sent between them."""
    parallel, model = data_parallel(), tiny_models("bert", "classification")
    objective, frozen, adapters, _, _ = answers(model, Lora(rank=4), texts(model))
    packed, alone = both_ways(texts(model), 4)
    run = jax.jit(lambda frozen, adapters, batch: objective.logits(frozen, adapters, {}, batch))
    args = (*parallel.replicate((frozen, adapters)), parallel.shard(packed))
    real = packed["weights"] > 0
    np.testing.assert_allclose(run(*args)[real], run(frozen, adapters, alone)[real], rtol=1e-5, atol=1e-5)
    program = run.lower(*args).compile().as_text()
    assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if kind in program]


@pytest.mark.parametrize("packed", slow_but([False, True], True))
def test_the_arguments_of_cudnn(packed):
    """cuDNN's call with XLA in its place: masks and lengths say what dense attention is told."""
    query, key, value = (tiny.normal(seed, 2, 9, 2, 8) for seed in range(3))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [3, 4, 4, 4, 4, 4, 4, 4, 0]], np.int32)
    segments = segments if packed else (segments > 0).astype(np.int32)
    call = attention._cudnn_packed if packed else attention._cudnn
    found = call(query, key, value, segments, implementation="xla")
    expected = attention._dense(query, key, value, segments)
    np.testing.assert_allclose(found[segments > 0], expected[segments > 0], rtol=1e-5, atol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.usefixtures("standard_promotion")
def test_flash_stands_in_where_it_pays(tiny_models, monkeypatch):
    """In a bf16 model, for rows long enough, and never where attention weights are to be dropped."""
    calls = []
    monkeypatch.setattr(attention, "_cudnn", lambda q, k, v, s: calls.append(q.shape) or attention._dense(q, k, v, s))
    model = tiny_models("bert", dtype="bfloat16")
    frozen, adapters = tiny.adapted(model, Lora(rank=4))
    flash = Flash("cudnn", min_length=16)
    for length, rng, expected in ((12, None, 0), (16, None, 2), (16, jax.random.key(0), 0)):
        calls.clear()
        batch = tiny.batch(2, length=length)
        objective = Objective(model, Lora(rank=4), tiny.task_of(model), flash)
        jax.eval_shape(partial(objective.logits, frozen, adapters, {}, batch, rng))
        assert len(calls) == expected


@pytest.mark.usefixtures("standard_promotion")
def test_where_flash_can_be(tiny_models):
    plain, narrow = tiny_models("bert"), tiny_models("bert", dtype="bfloat16")
    still = tiny_models("bert", dtype="bfloat16", dropout=0.0)
    each = data_parallel().over_devices
    assert choose_flash("auto", narrow, H200, each).min_length == 512
    assert choose_flash("auto", narrow, TPU, each).min_length == 1024
    assert choose_flash("flash", still, H200, each).kernel == "cudnn"
    assert choose_flash("flash", still, TPU, each) == Flash("tpu", 0, each)
    for asked, model, device in (
        ("dense", still, H200),
        ("auto", plain, H200),
        ("auto", still, jax.devices()[0]),
        ("auto", still, SimpleNamespace(platform="gpu", compute_capability="7.5")),
        ("auto", still, SimpleNamespace(platform="gpu", compute_capability="gfx90a")),
    ):
        assert choose_flash(asked, model, device, each) is None
    for model, device, message in (
        (still, jax.devices()[0], "needs a TPU, or an NVIDIA GPU .* and this is a cpu"),
        (plain, H200, "computes in bfloat16, and model.dtype is float32"),
        (narrow, TPU, "this model's rate in training is 0.1; give --model.dropout 0"),
    ):
        with pytest.raises(InputError, match=message):
            choose_flash("flash", model, device, each)


def test_packing_needs_a_known_attention(tiny_models):
    message = r"data\.packing: jaxpeft does not know the attention of 'albert'; it is known for bert, .*, distilbert$"
    with pytest.raises(InputError, match=message):
        check_packing(SimpleNamespace(family=family_of("albert")))
    sines = SimpleNamespace(family=family_of("distilbert"), config=SimpleNamespace(sinusoidal_pos_embds=True))
    with pytest.raises(InputError, match="needs position embeddings"):
        check_packing(sines)
