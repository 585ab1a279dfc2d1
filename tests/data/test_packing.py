"""Several texts in a row: each once an epoch, nothing lost, one shape that the worst batch fits, and few tokens of padding."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.data import ClassificationData, Encoded, PackedData, encode_texts
from jaxpeft.data.classification import BUCKET_LENGTHS, cap_buckets
from jaxpeft.data.packing import first_fit_decreasing, lay_out


def random_texts(rows=50, texts_a_batch=8, seed=5):
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 25, rows)
    ids = np.arange(1, lengths.sum() + 1, dtype=np.int32)  # every token its own: nothing can be mistaken
    encoded = Encoded(ids, ids % 2, np.cumsum([0, *lengths]), 0, 32, 0)
    return ClassificationData(encoded, np.arange(rows, dtype=np.int32), texts_a_batch, (32,), seed)


def unpacked(batch):
    """label → (tokens, types, positions) of every text of weight 1, found by its segment, and its start."""
    texts = {}
    devices, each = batch["starts"].shape
    flat = {
        name: batch[name].reshape(devices, -1) for name in ("segments", "input_ids", "token_type_ids", "position_ids")
    }
    for number in np.flatnonzero(batch["weights"]):
        device, start = number // each, batch["starts"].ravel()[number]
        mine = np.flatnonzero(flat["segments"][device] == number + 1)
        assert mine[0] == start
        assert (np.diff(mine) == 1).all()
        texts[int(batch["labels"][number])] = [
            flat[name][device][mine].tolist() for name in ("input_ids", "token_type_ids", "position_ids")
        ]
        # All of it in one row.
        assert len(set(mine // batch["segments"].shape[1])) == 1
    return texts


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("rows", [50, 48, 5])
def test_each_text_is_whole_and_once_an_epoch(rows, devices):
    data = PackedData(random_texts(rows), 32, devices)
    offsets, ids = data.unpacked.encoded.offsets, data.unpacked.encoded.input_ids
    for epoch in range(2):
        seen = {}
        for step in range(data.batches_per_epoch):
            batch = data.train_batch(epoch * data.batches_per_epoch + step)
            assert {batch["input_ids"].shape} == data.batch_shapes
            assert len(batch["input_ids"]) % devices == 0
            assert (
                batch["weights"].sum() >= min(rows, 8) - 1
            )  # what is missing to an epoch is missing in several batches
            np.testing.assert_array_equal(batch["attention_mask"], batch["segments"] > 0)
            assert (batch["input_ids"][batch["segments"] == 0] == 0).all()
            assert not seen.keys() & unpacked(batch).keys()
            seen |= unpacked(batch)
        for row, (start, stop) in enumerate(pairwise(offsets)):
            tokens = ids[start:stop].tolist()
            assert seen.pop(row) == [tokens, [token % 2 for token in tokens], list(range(stop - start))]
        assert not seen


def test_the_program_assembles_what_the_host_does():
    data = PackedData(random_texts(), 32, 2)
    assemble = jax.jit(lambda device_data, draw: data.assemble(device_data, draw, jnp))
    for step in range(data.batches_per_epoch):
        expected = data.train_batch(step)
        for name, found in assemble(data.device_data, data.draw(step)).items():
            np.testing.assert_array_equal(found, expected[name])
            assert found.dtype == expected[name].dtype


def test_batches_depend_on_seed_and_step_alone():
    one, fresh, other = (PackedData(random_texts(seed=seed), 32) for seed in (5, 5, 6))
    for step in (20, 0, 7):
        np.testing.assert_array_equal(one.draw(step)["rows"], fresh.draw(step)["rows"])
    assert one.draw(0)["rows"].tolist() != other.draw(0)["rows"].tolist()
    assert one.draw(0)["rows"].tolist() != one.draw(one.batches_per_epoch)["rows"].tolist()
    # And the same texts a batch on any number of devices.
    assert set(one.draw(3)["rows"]) == set(PackedData(random_texts(seed=5), 32, 4).draw(3)["rows"])


def test_the_worst_batch_fits():
    """The longest text of every stratum in one batch: it is laid out as all others are."""
    data = PackedData(random_texts(), 32)
    longest = data._strata[:, -1][data.layout.strata].astype(np.int32)
    batch = data.assemble(data.device_data, {"rows": longest}, np)
    lengths = data.unpacked.encoded.lengths[longest]
    assert (batch["segments"] > 0).sum() == lengths.sum()
    assert {label: len(tokens) for label, (tokens, _, _) in unpacked(batch).items()} == dict(
        zip(longest, lengths, strict=True)
    )


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing(np.array([3, 6, 5, 4, 2]), 10) == [[1, 3], [2, 0, 4]]
    # Dealt to and fro, 8 4 3 and 6 5 2: [8], [4 3] and [6 2], [5].
    layout = lay_out(np.array([2, 3, 4, 5, 6, 8]), 10, 2)
    assert (layout.strata.tolist(), layout.rows.tolist()) == ([5, 2, 1, 4, 0, 3], [0, 1, 1, 2, 2, 3])
    assert layout.num_rows == 4


def test_real_sentences_need_little_padding(real_data, tokenizer, capsys):
    """SST-2's sentences, 32 a batch: the share of real tokens, packed, in buckets, and padded to the longest of a batch."""
    lines = (real_data / "sst2" / "train-sentences.tsv").read_text().splitlines()
    encoded = encode_texts([line.split("\t")[0] for line in lines], None, tokenizer, max_length=128)
    buckets = cap_buckets(BUCKET_LENGTHS, 128)
    texts = ClassificationData(encoded, np.zeros(len(lines), np.int32), 32, buckets, seed=0)
    real, packed = encoded.lengths.sum(), PackedData(texts, 128)
    ((rows, length),) = packed.batch_shapes
    order = np.random.default_rng(0).permutation(len(lines))[: len(lines) // 32 * 32].reshape(-1, 32)
    shares = {
        "packed": real / (packed.batches_per_epoch * rows * length),
        "buckets": real / sum(texts.draw(step)["columns"].size * 32 for step in range(texts.batches_per_epoch)),
        "dynamic padding": encoded.lengths[order].sum() / (32 * encoded.lengths[order].max(axis=1)).sum(),
    }
    with capsys.disabled():
        print(
            f"\nreal tokens: {', '.join(f'{name} {share:.3f}' for name, share in shares.items())}; {rows} rows of {length}"
        )
    assert shares["packed"] > 0.9 > 0.65 < shares["buckets"]
    assert shares["dynamic padding"] < 0.5
