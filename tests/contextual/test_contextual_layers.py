"""Layers with channels left out: the mathematics of the slices, whatever adapts them, and whatever they are stored in."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from compiling import AS_USERS
from tiers import slow, slow_but

from jaxpeft.adapters import AdaLora, Hira, Ia3, Loha, Lokr, Lora, Vera
from jaxpeft.contextual import ContextualSparsity
from jaxpeft.contextual.estimators import make_estimators, projection_paths
from jaxpeft.contextual.layers import layer_overrides
from jaxpeft.errors import InputError
from jaxpeft.inject import apply
from jaxpeft.pruning.structures import num_kept
from jaxpeft.quantization import Quantization
from jaxpeft.training.objective import Objective
from jaxpeft.training.optimizer import build_optimizer
from jaxpeft.training.sharding import data_parallel
from jaxpeft.training.step import init_state, make_train_step
from jaxpeft.trees import ESTIMATORS, join, without_shared

LINEAR = {
    "bert": ("query", "key", "value", "dense"),
    "roberta": ("query", "key", "value", "dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
}
METHODS = {
    "none": None,
    "lora": Lora(rank=2, lora_bias=True),
    "dora": Lora(rank=2, use_dora=True),
    "hira": Hira(rank=2),
    "loha": Loha(rank=2),
    "lokr": Lokr(rank=2),
    "vera": Vera(rank=4),
    "adalora": AdaLora(init_r=2, target_r=1),
    "ia3": Ia3(feedforward_modules=("output.dense",)),
}
HALF = ContextualSparsity((0.5, 0.75), (0.5, 0.25))

pytestmark = pytest.mark.xdist_group("contextual-layers")


def in_encoder(model, kind):
    prefix = model.base_prefix
    return [
        path.replace("/", ".")
        for path in model.sites()
        if path.startswith(prefix) and "/layer/" in path and path.endswith(LINEAR[kind])
    ]


def assert_equal_to_six_digits(found, expected, *, within=1e-6):
    """No entry differs by more than `within` of its tensor's largest one, or than `within`."""
    chex.assert_trees_all_equal_shapes(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max(initial=0) <= within * max(1.0, np.abs(b).max(initial=0))


def without_dropout(tiny_models, kind, task="masked-lm", **options):
    return tiny_models(kind, task, dropout=0.0, **options)


@pytest.mark.parametrize("kind", slow_but(["bert", "distilbert", "roberta"], "distilbert"))
def test_layers_that_keep_every_channel_are_the_dense_ones(tiny_models, kind):
    """The whole machinery at work, with nothing left out: logits and gradients of plain LoRA. With dense tokens, and without."""
    model, method = without_dropout(tiny_models, kind), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method, target_modules=in_encoder(model, kind))
    frozen = {**frozen, ESTIMATORS: make_estimators(model, range(2))}
    plain = Objective(model, method, tiny.task_of(model))
    # round(32 · (1 − 0.001)) = 32: all channels are chosen, sliced and put back.
    all_of_them = [ContextualSparsity((0.001,) * 2, (0.001,) * 2, dense_tokens=dense) for dense in (True, False)]

    @jax.jit
    def all_three(adapters):
        def of(objective):
            def loss(adapters):
                logits = objective.logits(frozen, adapters, {}, tiny.batch(4), jax.random.key(0))
                total, weight = objective.loss(logits, tiny.batch(4))
                return total / weight, logits

            return jax.value_and_grad(loss, has_aux=True)(adapters)

        return of(plain), *(of(replace(plain, contextual=settings)) for settings in all_of_them)

    expected, with_dense_tokens, found = all_three(adapters)
    # Sums over tokens are in another order if these were moved, and fp32 rounds to 6e-8 a term.
    assert_equal_to_six_digits(with_dense_tokens, expected, within=3e-6)
    assert_equal_to_six_digits(found, expected)


def test_a_sparsity_of_zero_changes_no_bit(tiny_models):
    """The program is the same text."""
    model, method = without_dropout(tiny_models, "bert"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method)
    objective = Objective(model, method, tiny.task_of(model))
    zero = replace(objective, contextual=ContextualSparsity((0.0, 0.0), (0.0, 0.0), dense_tokens=False))
    plain, same = (
        jax.jit(lambda adapters, o=o: o.logits(frozen, adapters, {}, tiny.batch(2), jax.random.key(0)))
        .lower(adapters)
        .as_text()
        for o in (objective, zero)
    )
    assert plain == same


@pytest.mark.parametrize(
    ("kind", "name", "stored"),
    [
        ("bert", "lora", None),
        *(
            pytest.param(kind, name, stored, marks=slow)
            for kind, name, stored in [
                *(("bert", name, None) for name in METHODS if name != "lora"),
                *(("bert", name, "nf4") for name in ("none", "lora", "dora", "ia3")),
                *(("distilbert", name, None) for name in ("lora", "dora")),
            ]
        ),
    ],
)
def test_slices_are_dense_layers_with_the_dropped_channels_zeroed(tiny_models, kind, name, stored):
    """For every method, at every layer that is sliced: outputs and gradients."""
    method = METHODS[name]
    options = {"quantization": Quantization(stored)} if stored else {}
    model = without_dropout(tiny_models, kind, **options)
    if method is None:
        frozen, adapters = model.params, {"sites": {}, "modules": {}}
    else:
        frozen, adapters = tiny.adapted(model, method, target_modules=in_encoder(model, kind))
    estimators, batch = make_estimators(model, range(2)), tiny.batch(2)
    inputs = model.inputs({key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")})
    keep = {
        "attention": np.array([num_kept(32, share) for share in HALF.attention]),
        "feed_forward": np.array([num_kept(48, share) for share in HALF.feed_forward]),
    }

    @partial(jax.jit, compiler_options=AS_USERS)
    def both(adapters):
        def of(zeroed):
            def loss(adapters):
                params = join(without_shared(frozen)[0], adapters["modules"])
                overrides = layer_overrides(
                    model, HALF, params, estimators, tokens=inputs["attention_mask"], zeroed=zeroed
                )
                out = apply(model.module, frozen, adapters, method, layer_overrides=overrides, **inputs).logits
                return jnp.square(out).mean(), out

            return jax.value_and_grad(loss, has_aux=True)(adapters)

        return of(None), of(keep)

    sliced, zeroed = both(adapters)
    assert_equal_to_six_digits(sliced, zeroed)


def test_fewer_channels_are_fewer_operations(tiny_models):
    model, method = without_dropout(tiny_models, "bert"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method)
    frozen = {**frozen, ESTIMATORS: make_estimators(model, range(2))}
    objective = Objective(model, method, tiny.task_of(model))

    def flops(share):
        settings = ContextualSparsity((share,) * 2, (share,) * 2, dense_tokens=False)
        step = jax.jit(
            jax.grad(
                lambda adapters: (
                    replace(objective, contextual=settings)
                    .logits(frozen, adapters, {}, tiny.batch(4), jax.random.key(0))
                    .sum()
                )
            )
        )
        return step.lower(adapters).cost_analysis()["flops"]

    assert flops(0.9) < 0.8 * flops(0.25)


def test_the_tokens_that_the_loss_reads_stay_dense(tiny_models):
    """One layer, which reads only masked tokens: their queries and feed-forward layers leave nothing out, their keys' context does."""
    model, method = without_dropout(tiny_models, "bert"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method)
    objective = Objective(model, method, tiny.task_of(model))
    last_ffn = ContextualSparsity((0.0, 0.9), (0.0, 0.0), "random")
    logits = {
        dense: replace(objective, contextual=replace(last_ffn, dense_tokens=dense)).logits(
            frozen, adapters, {}, tiny.batch(2), jax.random.key(0)
        )
        for dense in (True, False)
    }
    plain = objective.logits(frozen, adapters, {}, tiny.batch(2), jax.random.key(0))
    chex.assert_trees_all_close(logits[True], plain, rtol=1e-5, atol=1e-5)
    assert np.abs(logits[False] - plain).max() > 1e-3


@pytest.mark.parametrize("selection", ["svd", "oracle", "random"])
def test_evaluation_is_dense_and_training_is_not(tiny_models, selection):
    model, method = without_dropout(tiny_models, "bert"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method)
    frozen = {**frozen, ESTIMATORS: make_estimators(model, range(2))}
    objective = Objective(model, method, tiny.task_of(model))
    sparse = replace(objective, contextual=ContextualSparsity((0.5, 0.5), (0.5, 0.5), selection))
    plain, same = (o.logits(frozen, adapters, {}, tiny.batch(2)) for o in (objective, sparse))
    np.testing.assert_array_equal(plain, same)
    key, other = jax.random.split(jax.random.key(3))
    trained = sparse.logits(frozen, adapters, {}, tiny.batch(2), key)
    assert np.abs(trained - plain).max() > 1e-3
    # Only a choice at random depends on the key.
    again = sparse.logits(frozen, adapters, {}, tiny.batch(2), other)
    assert (np.abs(trained - again).max() > 1e-3) == (selection == "random")


@slow
def test_packed_rows_and_classifiers(tiny_models):
    """Rows of several texts cannot be reordered: their first tokens are computed twice, and equal the dense ones."""
    model, method = without_dropout(tiny_models, "bert", "classification"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method, target_modules=in_encoder(model, "bert"))
    frozen = {**frozen, ESTIMATORS: make_estimators(model, range(2))}
    plain = Objective(model, method, tiny.task_of(model))
    rows = tiny.batch(2, task="classification")
    places = np.broadcast_to(np.r_[np.arange(8), np.arange(8)], (2, 16)).astype(np.int32)
    packed = {
        **rows,
        "segments": np.repeat([[1, 2], [1, 2]], 8, axis=1).astype(np.int32),
        "position_ids": places,
        "starts": np.array([[0, 8, 16, 24]], np.int32),
        "labels": np.zeros(4, np.int32),
        "weights": np.ones(4, np.float32),
    }
    sparse = replace(plain, contextual=ContextualSparsity((0.001, 0.001), (0.001, 0.001)))
    for batch in (rows, packed):
        logits = [
            jax.jit(lambda adapters, o=o, b=batch: o.logits(frozen, adapters, {}, b, jax.random.key(0)))(adapters)
            for o in (plain, sparse)
        ]
        chex.assert_trees_all_close(logits[1], logits[0], rtol=1e-5, atol=2e-6)
        left_out = replace(plain, contextual=ContextualSparsity((0.0, 0.9), (0.0, 0.0), "random"))
        last = left_out.logits(frozen, adapters, {}, batch, jax.random.key(0))
        chex.assert_trees_all_close(last, logits[0], rtol=1e-5, atol=2e-6)


@slow
def test_four_devices_choose_what_one_would_and_accumulation_works(tiny_models):
    model, method = without_dropout(tiny_models, "bert"), Lora(rank=2)
    frozen, adapters = tiny.adapted(model, method)
    frozen = {**frozen, ESTIMATORS: make_estimators(model, range(2))}
    objective = Objective(model, method, tiny.task_of(model), None, HALF)
    optimizer = build_optimizer(lambda step: 1e-2, weight_decay=0.0, max_grad_norm=1.0, accumulation_steps=2)
    step, losses = make_train_step(objective, optimizer), []
    for devices in (jax.devices()[:1], jax.devices()[:4]):
        parallel = data_parallel(devices)
        state = parallel.replicate(init_state(adapters, optimizer, jax.random.key(7), pruned=False))
        there = parallel.replicate(frozen)
        for i in range(4):
            state, metrics = step(state, there, parallel.shard(tiny.batch(4, seed=i)))
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[:4], losses[4:], rtol=1e-5)


def test_a_family_whose_projections_are_not_known_is_refused(tiny_models):
    albert = replace(tiny_models("bert"), config=type("Config", (), {"model_type": "albert"})())
    with pytest.raises(InputError, match="contextual sparsity"):
        projection_paths(albert, 0)
