import warnings

import numpy as np
import pytest

from jaxpeft.data import load_file, make_blocks, mask_rows, maskable, masked_lm_data, num_masked
from jaxpeft.errors import InputError

LENGTH = 64


@pytest.fixture(scope="module")
def texts(real_data):
    return load_file(str(real_data / "wikitext-2" / "valid.txt")).texts[:600]


@pytest.fixture(scope="module")
def data(texts, tokenizer):
    return masked_lm_data(texts, tokenizer, length=LENGTH, batch_size=32, ratio=0.15, seed=3)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def mask(rows, can_mask, **options):
    given = {"ratio": 0.15, "num_positions": 9, "mask_token_id": 103, "pad_token_id": 0, "vocab_size": 30522}
    given |= {"rng": np.random.default_rng(0), "special_ids": (0, 100, 101, 102, 103)}
    return mask_rows(rows, can_mask, **{**given, **options})


def test_blocks_are_wrapped_and_hold_the_text_in_order(texts, tokenizer, data):
    blocks = data.blocks
    assert blocks.dtype == np.int32
    assert blocks.shape[1] == LENGTH
    assert (blocks[:, 0] == tokenizer.cls_token_id).all()
    assert (blocks[:-1, -1] == tokenizer.sep_token_id).all()
    joined = tokenizer(" ".join(texts).replace("<unk>", "[UNK]"), add_special_tokens=False, verbose=False)["input_ids"]
    inner = [token for token in blocks[:, 1:].ravel() if token not in (tokenizer.sep_token_id, tokenizer.pad_token_id)]
    assert 0 <= len(joined) - len(inner) < LENGTH / 4
    assert inner == joined[: len(inner)]
    assert (tokenizer.unk_token_id == blocks).any()


@pytest.mark.parametrize(
    ("num_words", "num_rows", "last"),
    [(6, 1, 8), (7, 2, 3), (12, 2, 8), (1, 1, 3)],
)
def test_the_last_piece_of_blocks(num_words, num_rows, last, tokenizer):
    blocks = make_blocks(["word"] * num_words, tokenizer, length=8)
    assert len(blocks) == num_rows
    assert (blocks[-1] != tokenizer.pad_token_id).sum() == last
    assert blocks[-1, last - 1] == tokenizer.sep_token_id


def test_a_short_last_piece_is_dropped_unless_it_is_all(tokenizer):
    assert len(make_blocks(["word"] * 31, tokenizer, length=32)) == 1
    assert len(make_blocks(["word"] * 36, tokenizer, length=32)) == 2
    assert len(make_blocks(["word"], tokenizer, length=32)) == 1


def test_what_blocks_refuse(tokenizer):
    with pytest.raises(InputError, match="the 2 texts hold no tokens"):
        make_blocks(["", " "], tokenizer, length=8)
    with pytest.raises(InputError, match="length 2 leaves no room"):
        make_blocks(["a"], tokenizer, length=2)
    with pytest.raises(InputError, match="mask ratio 0 is not a share"):
        masked_lm_data(["a"], tokenizer, length=8, batch_size=1, ratio=0, seed=0)
    with pytest.raises(InputError, match="batch size 0"):
        masked_lm_data(["a"], tokenizer, length=8, batch_size=0, ratio=0.1, seed=0)


def test_long_texts_give_no_warning(tokenizer, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_blocks(["word " * 2000], tokenizer, length=8)
    assert not caplog.records


def test_special_and_unknown_tokens_are_never_masked(tokenizer):
    blocks = make_blocks(["the <unk> of [MASK] the"], tokenizer, length=8)
    assert maskable(blocks, tokenizer).tolist() == [[False, True, False, True, False, True, False, False]]
    assert tokenizer.convert_ids_to_tokens(blocks[0])[2] == "[UNK]"


def test_exact_number_of_masked_tokens(data):
    num_maskable = data.can_mask.sum(axis=1)
    assert (num_maskable < LENGTH - 2).any()  # rows with <unk>
    batch = mask(data.blocks, data.can_mask, num_positions=data.num_positions)
    expected = np.minimum(np.maximum(1, np.rint(0.15 * num_maskable)), num_masked(LENGTH, 0.15))
    np.testing.assert_array_equal(batch["weights"].sum(axis=1), expected)
    used = batch["weights"] > 0
    rows = np.nonzero(used)[0]
    assert data.can_mask[rows, batch["positions"][used]].all()
    np.testing.assert_array_equal(batch["labels"][used], data.blocks[rows, batch["positions"][used]])
    differences = np.diff(batch["positions"], axis=1)
    assert (differences[used[:, 1:]] > 0).all()
    assert (batch["positions"][~used] == 0).all()
    changed = batch["input_ids"] != data.blocks
    assert changed.sum(axis=1).max() <= num_masked(LENGTH, 0.15)
    assert not changed[~data.can_mask].any()


def test_counts_by_hand():
    rows = np.full((4, 8), 7, np.int32)
    can_mask = np.arange(8) < np.array([[0], [1], [4], [6]])
    batch = mask(rows, can_mask, ratio=0.5, num_positions=3)
    assert batch["weights"].tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["input_ids"].dtype == batch["positions"].dtype == batch["labels"].dtype == np.int32
    assert [num_masked(length, 0.15) for length in (3, 64, 128, 512)] == [1, 9, 19, 76]


def test_shares_of_mask_random_and_unchanged():
    rows = np.full((4000, 64), 2000, np.int32)
    can_mask = np.ones(rows.shape, bool)
    batch = mask(rows, can_mask, num_positions=10)
    replaced = np.take_along_axis(batch["input_ids"], batch["positions"], axis=1)
    assert abs((replaced == 103).mean() - 0.8) < 0.01
    assert abs((replaced == 2000).mean() - 0.1) < 0.01
    small = mask(rows, can_mask, num_positions=10, vocab_size=106)["input_ids"]
    assert set(np.unique(small)) <= {*range(1, 100), 103, 104, 105, 2000}
    counts = np.bincount(batch["positions"].ravel(), minlength=64)
    assert 0.8 < counts.min() / counts.mean() < counts.max() / counts.mean() < 1.2


def test_train_batches_do_not_depend_on_history(texts, tokenizer, data):
    steps = range(2 * data.batches_per_epoch + 2)
    unbroken = [data.train_batch(step) for step in steps]
    fresh = masked_lm_data(texts, tokenizer, length=LENGTH, batch_size=32, ratio=0.15, seed=3)
    for step in reversed(steps):
        assert_same(fresh.train_batch(step), unbroken[step])
    other = masked_lm_data(texts, tokenizer, length=LENGTH, batch_size=32, ratio=0.15, seed=4)
    assert (other.train_batch(0)["input_ids"] != unbroken[0]["input_ids"]).any()


def restore(batch):
    rows = batch["input_ids"].copy()
    for row, positions, labels, weights in zip(
        rows, batch["positions"], batch["labels"], batch["weights"], strict=True
    ):
        row[positions[weights > 0]] = labels[weights > 0]
    return rows


def test_each_row_once_an_epoch_with_fresh_masks(data):
    epochs = []
    for epoch in range(2):
        start = epoch * data.batches_per_epoch
        batches = [data.train_batch(start + index) for index in range(data.batches_per_epoch)]
        real = np.concatenate([batch["weights"].any(axis=1) for batch in batches])
        assert real.sum() == len(data.blocks)
        assert {batch["input_ids"].shape for batch in batches} == data.batch_shapes
        rows = np.concatenate([restore(batch) for batch in batches])[real]
        assert sorted(map(tuple, rows)) == sorted(map(tuple, data.blocks))
        positions = np.concatenate([batch["positions"] for batch in batches])[real]
        epochs.append({tuple(row): tuple(chosen) for row, chosen in zip(rows, positions, strict=True)})
    assert sum(epochs[0][row] == epochs[1][row] for row in epochs[0]) < 0.02 * len(epochs[0])


def collect(batches):
    batches = list(batches)
    real = np.concatenate([batch["weights"].any(axis=1) for batch in batches])
    return {name: np.concatenate([batch[name] for batch in batches])[real] for name in batches[0]}


def test_evaluation_masks_do_not_depend_on_batch_size_or_seed(texts, tokenizer, data):
    expected = collect(data.eval_batches())
    assert len(expected["input_ids"]) == len(data.blocks)
    np.testing.assert_array_equal(restore(expected), data.blocks)
    for batch_size, seed in ((1, 3), (50, 9), (10_000, 3)):
        other = masked_lm_data(texts, tokenizer, length=LENGTH, batch_size=batch_size, ratio=0.15, seed=seed)
        batches = list(other.eval_batches())
        assert {batch["input_ids"].shape for batch in batches} == other.batch_shapes
        assert_same(collect(batches), expected)


def test_every_token_masked_alone(tokenizer):
    data = masked_lm_data(["one two <unk> three"], tokenizer, length=6, batch_size=2, ratio=0.15, seed=0)
    batches = list(data.single_mask_batches())
    assert [batch["weights"].tolist() for batch in batches] == [[[1], [1]], [[1], [0]]]
    found = collect(batches)
    assert found["positions"].ravel().tolist() == [1, 2, 4]
    assert tokenizer.convert_ids_to_tokens(found["labels"].ravel()) == ["one", "two", "three"]
    masked = found["input_ids"] == tokenizer.mask_token_id
    assert masked.sum(axis=1).tolist() == [1, 1, 1]
    np.testing.assert_array_equal(restore(found), np.repeat(data.blocks, 3, axis=0))
