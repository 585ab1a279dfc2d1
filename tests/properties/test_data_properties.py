"""Batches of any rows: each row once an epoch, no text split or joined to another, exactly the share of tokens masked."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxpeft.data import ClassificationData, Encoded, PackedData
from jaxpeft.data.masks import mask_rows, num_masked
from jaxpeft.data.order import FILL, cut, epoch_order
from jaxpeft.data.packing import first_fit_decreasing, lay_out

ROOM = 32
LENGTHS = st.lists(st.integers(1, ROOM), min_size=1, max_size=40)


@given(LENGTHS)
def test_first_fit_loses_no_text_and_overfills_no_row(lengths):
    rows = first_fit_decreasing(np.array(lengths), ROOM)
    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    fill = [sum(lengths[text] for text in row) for row in rows]
    assert max(fill) <= ROOM
    # No two rows would fit in one: the later one's first text found no place in the earlier.
    assert all(a + b > ROOM for i, a in enumerate(fill) for b in fill[i + 1 :])


@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.data())
def test_a_layout_gives_every_device_as_many_texts_and_rows(each, devices, data):
    limits = np.sort(data.draw(st.lists(st.integers(1, ROOM), min_size=each * devices, max_size=each * devices)))
    layout = lay_out(limits, ROOM, devices)
    assert sorted(layout.strata) == list(range(len(limits)))
    assert layout.num_rows % devices == 0
    assert (np.diff(layout.rows) >= 0).all()
    device = layout.rows // (layout.num_rows // devices)
    assert (np.bincount(device, minlength=devices) == each).all()
    assert np.bincount(layout.rows, limits[layout.strata], layout.num_rows).max() <= ROOM


@st.composite
def packed(draw):
    """Texts of any lengths, every token its own number, and how many of them are a batch."""
    lengths = draw(LENGTHS)
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    encoded = Encoded(ids, np.zeros_like(ids), np.cumsum([0, *lengths]), 0, ROOM, 0)
    devices = draw(st.sampled_from([1, 2]))
    batch_size = devices * draw(st.integers(1, 4))
    texts = ClassificationData(
        encoded, np.arange(len(lengths), dtype=np.int32), batch_size, (ROOM,), draw(st.integers(0, 99))
    )
    return PackedData(texts, ROOM, devices)


@given(packed(), st.integers(0, 3))
def test_packing_shows_every_text_once_whole_and_by_itself(data, epoch):
    offsets, seen = data.unpacked.encoded.offsets, []
    for index in range(data.batches_per_epoch):
        batch = data.train_batch(epoch * data.batches_per_epoch + index)
        assert {batch["input_ids"].shape} == data.batch_shapes
        real = np.flatnonzero(batch["weights"])
        assert set(np.unique(batch["segments"])) - {0} == set(real + 1)
        for text in real:
            row, column = np.nonzero(batch["segments"] == text + 1)
            label = batch["labels"][text]
            assert len(set(row)) == 1
            expected = np.arange(offsets[label], offsets[label + 1]) + 1
            np.testing.assert_array_equal(batch["input_ids"][row, column], expected)
            np.testing.assert_array_equal(batch["position_ids"][row, column], np.arange(len(expected)))
            assert (np.diff(column) == 1).all()
            seen.append(int(label))
        assert (batch["attention_mask"] == (batch["segments"] > 0)).all()
    assert sorted(seen) == list(range(len(offsets) - 1))


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 99), st.integers(0, 99))
def test_an_epoch_has_each_row_once_and_fills_only_the_last_batch(rows, batch_size, seed, epoch):
    batches = epoch_order(rows, batch_size, seed, epoch)
    assert sorted(batches[batches != FILL]) == list(range(rows))
    assert (batches[:-1] != FILL).all()
    assert batches.shape == (-(-rows // batch_size), batch_size)
    np.testing.assert_array_equal(epoch_order(rows, batch_size, seed, epoch), batches)
    np.testing.assert_array_equal(cut(np.arange(rows), batch_size).ravel()[:rows], np.arange(rows))


@given(
    st.integers(1, 5), st.integers(3, 20), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 10**6)
)  # fmt: skip
def test_exactly_the_share_of_maskable_tokens_is_masked(rows, length, ratio, share, seed):
    rng = np.random.default_rng(seed)
    mask_id, words = 3, np.arange(5, 50)
    tokens = rng.choice(words, (rows, length)).astype(np.int32)
    allowed = rng.random((rows, length)) < share
    allowed[:, [0, -1]] = False  # [CLS] and [SEP]
    places = num_masked(length, ratio)
    batch = mask_rows(
        tokens, allowed, pad_token_id=0, rng=rng, ratio=ratio, num_positions=places, mask_token_id=mask_id,
        vocab_size=50, special_ids=range(5),
    )  # fmt: skip
    assert batch["positions"].shape == batch["weights"].shape == (rows, places)
    for i in range(rows):
        used = batch["positions"][i][batch["weights"][i] > 0]
        maskable = int(allowed[i].sum())
        assert len(used) == min(max(1, round(ratio * maskable)), maskable, places)
        assert len(set(used)) == len(used)
        assert allowed[i][used].all()
        np.testing.assert_array_equal(batch["labels"][i][: len(used)], tokens[i][used])
        untouched = np.setdiff1d(np.arange(length), used)
        np.testing.assert_array_equal(batch["input_ids"][i][untouched], tokens[i][untouched])
        assert set(batch["input_ids"][i][used]) <= {mask_id, *words}
