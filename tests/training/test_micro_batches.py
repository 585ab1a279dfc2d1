"""A batch in several passes: the step is that of the whole batch, dropout included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType

from jaxpeft.adapters import AdaLora, Lora, PromptTuning
from jaxpeft.data import ClassificationData, Encoded, PackedData
from jaxpeft.models.build import Quantization
from jaxpeft.pruning.allocation import Allocation
from jaxpeft.training.dropout import PassRows, dropout_key, for_drawing
from jaxpeft.training.micro_batches import WHOLE, MicroBatches, fewest_passes, mean_loss_and_gradients
from jaxpeft.training.sharding import DataParallel
from jaxpeft.training.step import init_state, make_train_step

LORA = Lora(rank=4, alpha=8.0, dropout=0.1)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 5, 5)])
def test_a_pass_draws_the_bits_of_its_rows_in_the_whole_batch(shape, devices):
    key, rows = dropout_key(3), PassRows(shape[0] // devices, 8 // devices, devices)
    whole = jax.random.bits(for_drawing(key), (8, *shape[1:]))
    by_device = np.asarray(whole).reshape(devices, 8 // devices, *shape[1:])
    for number in range(2):
        drawn = jax.random.bits(rows.row_key(rows.key_of(key, number)), shape)
        expected = by_device[:, number * rows.in_pass : (number + 1) * rows.in_pass].reshape(shape)
        chex.assert_trees_all_equal(np.asarray(drawn), expected)


def steps_with(objective, optimizer, frozen, state, batches, micro_batches, allocation=None):
    """The adapters, the memory of AdaLoRA, and the losses after a step on each of `batches`."""
    step = make_train_step(objective, optimizer, micro_batches=micro_batches, allocation=allocation)
    losses = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        losses.append(metrics["loss"])
    return tiny.snapshot((state.adapters, state.memory, jnp.stack(losses)))


@pytest.mark.parametrize(("kind", "task"), [("bert", "masked-lm"), ("distilbert", "classification")])
def test_results_do_not_depend_on_the_micro_batch(tiny_models, kind, task):
    """Twenty steps with dropout in the base, in its attention and in the adapter."""
    model, found = tiny_models(kind, task), {}
    batches = [tiny.batch(32, task=task, seed=i) for i in range(20)]
    for rows in (1, 2, 4, 8, 32):
        found[rows] = steps_with(*tiny.training(model, LORA, learning_rate=1e-3), batches, MicroBatches(rows=rows))
    for rows in (1, 2, 4, 8):
        chex.assert_trees_all_close(found[rows][0], found[32][0], atol=1e-6, rtol=0)
        chex.assert_trees_all_close(found[rows][1], found[32][1], rtol=1e-6)


@pytest.mark.parametrize(("kind", "devices"), [("bert", 1), ("distilbert", 1), ("distilbert", 2)])
def test_packed_texts_and_several_devices(tiny_models, kind, devices):
    """Three passes of four rows for ten: the last has two, and two that are padding."""
    model, parallel = tiny_models(kind, "classification"), mesh_of(devices)
    data = PackedData(texts(), tiny.SEQUENCE, devices)
    batches = [parallel.shard(data.train_batch(i)) for i in range(3)]
    assert len(batches[0]["segments"]) == 10
    found = []
    for micro_batches in (WHOLE, MicroBatches(rows=4, devices=devices)):
        objective, optimizer, frozen, state = tiny.training(model, LORA, learning_rate=1e-3)
        placed = parallel.replicate((frozen, state))
        found.append(steps_with(objective, optimizer, *placed, batches, micro_batches))
    chex.assert_trees_all_close(*found, atol=1e-6, rtol=1e-6)


def texts(number=60, texts_a_batch=20):
    """Texts of 3 to 11 tokens and two labels."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, number)
    ids = rng.integers(5, tiny.VOCABULARY, lengths.sum()).astype(np.int32)
    encoded = Encoded(ids, np.zeros_like(ids), np.cumsum([0, *lengths]), 0, tiny.SEQUENCE, 0)
    return ClassificationData(encoded, rng.integers(0, 2, number).astype(np.int32), texts_a_batch, (tiny.SEQUENCE,), 0)


def mesh_of(count):
    devices = jax.devices()[:count]
    return DataParallel(jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices))


CASES = {
    "NF4": (("bert", "masked-lm", {"quantization": Quantization()}), LORA, {}),
    "AdaLoRA: its penalty is added once, its importance goes by all rows": (
        ("bert", "masked-lm", {}),
        AdaLora(init_r=4, target_r=2, total_step=20),
        {"allocated": True},
    ),
    "accumulation and clipping": (("bert", "masked-lm", {}), LORA, {"accumulation_steps": 2, "max_grad_norm": 0.1}),
    "prompts in front of the rows": (
        ("bert", "masked-lm", {}),
        PromptTuning(num_virtual_tokens=3),
        {"target_modules": ["word_embeddings"]},
    ),
    "masks": (("bert", "masked-lm", {}), LORA, {"pruned": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_whole_batch(tiny_models, case):
    (kind, task, options), method, setup = CASES[case]
    model = tiny_models(kind, task, **options)
    batches = [tiny.batch(8, task=task, seed=i) for i in range(4)]
    allocated = setup.get("allocated", False)
    schedule = Allocation(4, 2, 0, 20, 1, 0.85, 0.85) if allocated else None
    setup = {name: value for name, value in setup.items() if name != "allocated"}

    def steps(micro_batches):
        objective, optimizer, frozen, state = tiny.training(model, method, learning_rate=1e-3, **setup)
        if allocated:
            state = init_state(state.adapters, optimizer, state.rng, pruned=False, allocated=True)
        return steps_with(objective, optimizer, frozen, state, batches, micro_batches, schedule)

    whole, divided = steps(WHOLE), steps(MicroBatches(rows=3))  # passes of 3, 3 and 2 rows
    chex.assert_trees_all_close(divided, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_loss_and_gradients_are_those_of_the_whole_batch(tiny_models, rows):
    """Rows have different numbers of masked tokens, so a mean of the passes' means would be another loss."""
    model, batch = tiny_models("bert"), tiny.batch(8)
    weights = np.where(np.arange(8)[:, None] < 3, batch["weights"], 0.0).astype(np.float32)
    objective, _, frozen, state = tiny.training(model, LORA)

    def logits(adapters, batch, key, row_key):
        return objective.logits(frozen, adapters, {}, batch)

    whole, divided = (
        mean_loss_and_gradients(
            logits,
            objective.loss,
            objective.penalty,
            state.adapters,
            {**batch, "weights": weights},
            dropout_key(0),
            micro_batches,
        )
        for micro_batches in (WHOLE, MicroBatches(rows=rows))
    )
    assert float(jnp.abs(whole[1]["sites"][next(iter(whole[1]["sites"]))]["b"]).max()) > 1e-4
    chex.assert_trees_all_close(divided, whole, atol=1e-6, rtol=1e-6)


def test_a_step_needs_the_temporary_memory_of_one_pass(tiny_models, compiled_afresh):
    def temporary_bytes(rows, micro_batches):
        objective, optimizer, frozen, state = tiny.training(model, LORA)
        step = make_train_step(objective, optimizer, micro_batches=micro_batches)
        return step.lower(state, frozen, tiny.batch(rows)).compile().memory_analysis().temp_size_in_bytes

    model = tiny_models("bert")
    assert temporary_bytes(64, MicroBatches(rows=4)) < 1.3 * temporary_bytes(4, WHOLE)


def test_short_rows_share_a_pass_with_more_others():
    micro_batches = MicroBatches(tokens=1024)
    assert micro_batches.rows_of(32, 128) == PassRows(8, 32)
    assert micro_batches.rows_of(32, 32) == PassRows(32, 32)
    assert micro_batches.rows_of(32, 512) == PassRows(2, 32)
    assert micro_batches.rows_of(32, 2048) == PassRows(1, 32)
    assert MicroBatches(tokens=1024, devices=4).rows_of(32, 128) == PassRows(2, 8, 4)
    assert MicroBatches(rows=6).rows_of(32, 128) == PassRows(6, 32)
    assert MicroBatches(rows=64).rows_of(32, 128) == PassRows(32, 32)
    assert WHOLE.rows_of(32, 128) == PassRows(32, 32)
    assert MicroBatches(tokens=1024, virtual_tokens=20).rows_of(32, 12) == PassRows(32, 32)
    assert MicroBatches(tokens=1024, virtual_tokens=20).rows_of(32, 16) == PassRows(16, 32)


@pytest.mark.parametrize(
    ("rows", "first", "limit", "passes", "compiled"),
    [
        (32, 1, 1000, 1, [1]),  # all rows fit
        (32, 4, 1000, 1, [4, 1]),
        (32, 1, 100, 4, [1, 4]),  # predicted from the first
        (32, 4, 100, 4, [4]),  # the guess is right: half as many passes would need twice as much
        (32, 8, 100, 4, [8, 4]),
        (7, 1, 1, 8, [1, 8]),  # a row a pass, which is the least
    ],
)
def test_the_fewest_passes_that_fit_are_found(rows, first, limit, passes, compiled):
    tried = []

    def needed_bytes(passes):
        tried.append(passes)
        return 320 // passes

    assert fewest_passes(needed_bytes, rows, first=first, limit_bytes=limit) == passes
    assert tried == compiled


def test_what_all_passes_need_alike_does_not_hide_the_fewest_that_fit():
    """500 bytes whatever the passes, and 800 for the rows: 8 passes need 600."""
    tried = []

    def needed_bytes(passes):
        tried.append(passes)
        return 500 + 800 // passes

    assert fewest_passes(needed_bytes, 32, first=1, limit_bytes=640) == 8
    assert tried == [1, 4, 8]


def test_a_program_for_which_the_compiler_finds_no_room_has_too_few_passes():
    assert fewest_passes(lambda passes: None if passes < 4 else 10, 32, first=1, limit_bytes=100) == 4
