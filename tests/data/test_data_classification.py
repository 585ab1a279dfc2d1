import numpy as np
import pytest

from jaxpeft.data import ClassificationData, Encoded, classification_data, encode_texts, load_file
from jaxpeft.data.classification import bucketed_batches, cap_buckets
from jaxpeft.errors import InputError


@pytest.fixture(scope="module")
def dev(real_data):
    return load_file(str(real_data / "sst2" / "dev.tsv"))


def build(split, tokenizer, *, batch_size=32, max_length=128, seed=5, **options):
    given = {"batch_size": batch_size, "max_length": max_length, "seed": seed, **options}
    return classification_data(split.texts, split.pairs, split.labels, tokenizer, **given)


@pytest.fixture(scope="module")
def data(dev, tokenizer):
    return build(dev, tokenizer)


def row_key(batch, row):
    return tuple(batch["input_ids"][row][batch["attention_mask"][row] > 0]), int(batch["labels"][row])


def test_batches_hold_the_tokens_of_the_tokenizer(data, dev, tokenizer):
    expected = tokenizer(list(dev.texts))["input_ids"]
    seen = []
    for batch in data.eval_batches():
        for place, row in enumerate(batch["rows"]):
            if row >= 0:
                assert list(row_key(batch, place)[0]) == expected[row]
                assert batch["labels"][place] == dev.labels[row]
                seen.append(row)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
        np.testing.assert_array_equal(batch["weights"], batch["rows"] >= 0)
    assert sorted(seen) == list(range(len(dev)))


@pytest.mark.parametrize("epoch", [0, 1])
def test_each_row_once_an_epoch(data, dev, tokenizer, epoch):
    assert data.batches_per_epoch == -(-872 // 32)
    start = epoch * data.batches_per_epoch
    batches = [data.train_batch(start + index) for index in range(data.batches_per_epoch)]
    keys = [row_key(batch, row) for batch in batches for row in np.nonzero(batch["weights"])[0]]
    ids = tokenizer(list(dev.texts))["input_ids"]
    assert sorted(keys) == sorted((tuple(tokens), int(label)) for tokens, label in zip(ids, dev.labels, strict=True))
    assert {batch["input_ids"].shape for batch in batches} == data.batch_shapes
    assert sum((batch["weights"] == 0).any() for batch in batches) <= 1


def test_buckets_save_padding_and_are_shuffled(data):
    batches = [data.train_batch(step) for step in range(data.batches_per_epoch)]
    computed = sum(batch["input_ids"].size for batch in batches)
    assert computed < 0.65 * data.batches_per_epoch * 32 * 64  # every batch as long as the longest row's bucket
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert lengths != sorted(lengths)
    assert data.batch_shapes == {(32, 16), (32, 32), (32, 64)}
    assert {value.dtype for value in batches[0].values()} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_train_batches_do_not_depend_on_history(data, dev, tokenizer):
    fresh = build(dev, tokenizer)
    for step in (60, 3, 28, 27, 0):
        for name, value in fresh.train_batch(step).items():
            np.testing.assert_array_equal(value, data.train_batch(step)[name])
    again = [data.train_batch(step)["labels"].tolist() for step in range(28)]
    assert again != [data.train_batch(28 + step)["labels"].tolist() for step in range(28)]
    assert again != [build(dev, tokenizer, seed=6).train_batch(step)["labels"].tolist() for step in range(28)]


def test_leftovers_move_up():
    buckets = np.array([0] * 5 + [2] * 4)
    rows, bucket = bucketed_batches(buckets, 4, np.random.default_rng(0), np.random.default_rng(0))
    assert sorted(bucket.tolist()) == [0, 2, 2]
    assert (rows[bucket == 0] < 5).all()
    assert sorted(rows.ravel()) == [-1, -1, -1, *range(9)]
    rows, bucket = bucketed_batches(np.array([1]), 4, np.random.default_rng(0), np.random.default_rng(0))
    assert (rows.tolist(), bucket.tolist()) == ([[0, -1, -1, -1]], [1])


def test_seeds_share_the_shapes_and_not_the_rows(data):
    """So that runs of several seeds can train in one program."""
    other = data.with_seed(6)
    for step in range(2 * data.batches_per_epoch):
        ours, theirs = data.draw(step), other.draw(step)
        assert {name: values.shape for name, values in ours.items()} == {n: v.shape for n, v in theirs.items()}
    assert any((data.draw(step)["rows"] != other.draw(step)["rows"]).any() for step in range(3))


def test_buckets_end_at_max_length():
    assert cap_buckets((64, 16, 32, 128), 100) == (16, 32, 64, 100)
    assert cap_buckets((16, 32), 16) == (16,)
    assert cap_buckets((16, 32), 512) == (16, 32, 512)


def test_truncation_is_counted_or_refused(tokenizer):
    texts = ["a b", "a b c d e f g", "a"]
    encoded = encode_texts(texts, None, tokenizer, max_length=6)
    assert (encoded.num_truncated, encoded.lengths.tolist()) == (1, [4, 6, 3])
    assert encoded.input_ids[encoded.offsets[2] - 1] == tokenizer.sep_token_id
    with pytest.raises(InputError, match=r"row 2 has 9 tokens, data\.max_length is 6"):
        encode_texts(texts, None, tokenizer, max_length=6, truncate=False)
    assert encode_texts(texts, None, tokenizer, max_length=9, truncate=False).num_truncated == 0


def test_pairs_and_regression(tokenizer):
    targets = np.array([0.5, 4.75])
    options = {"max_length": 8, "batch_size": 2, "seed": 0, "bucket_lengths": (4,)}
    data = classification_data(["a", "b c d e"], ["d e f g h", "f"], targets, tokenizer, **options)
    batch = next(data.eval_batches())
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]
    assert batch["labels"].dtype == np.float32
    np.testing.assert_array_equal(batch["labels"], targets.astype(np.float32)[batch["rows"]])
    assert data.num_truncated == 1


def test_rows_without_labels(tokenizer):
    data = classification_data(["b b", "a"], None, None, tokenizer, max_length=8, batch_size=4, seed=0)
    (batch,) = data.eval_batches()
    assert batch["rows"].tolist() == [1, 0, -1, -1]
    assert batch["weights"].tolist() == [1, 1, 0, 0]
    assert batch["labels"].tolist() == [0, 0, 0, 0]
    assert batch["labels"].dtype == batch["rows"].dtype == np.int32


def test_refusals(tokenizer):
    options = {"max_length": 8, "batch_size": 4, "seed": 0}
    with pytest.raises(InputError, match="no texts"):
        classification_data([], None, None, tokenizer, **options)
    with pytest.raises(InputError, match="2 texts but 1 labels"):
        classification_data(["a", "b"], None, np.array([1]), tokenizer, **options)
    with pytest.raises(InputError, match="1 texts but 2 pairs"):
        classification_data(["a"], ["b", "c"], None, tokenizer, **options)
    with pytest.raises(InputError, match="max_length 2 leaves no room"):
        encode_texts(["a"], None, tokenizer, max_length=2)
    with pytest.raises(InputError, match="batch size 0"):
        classification_data(["a"], None, None, tokenizer, **{**options, "batch_size": 0})


def test_a_sample_is_a_fixed_choice_of_whole_rows_of_all_lengths(data):
    whole = {row_key(batch, place) for batch in data.eval_batches() for place in np.nonzero(batch["weights"])[0]}
    part = data.sample(64)
    chosen = [row_key(batch, place) for batch in part.eval_batches() for place in np.nonzero(batch["weights"])[0]]
    assert len(chosen) == 64
    assert set(chosen) <= whole
    assert np.median(part.encoded.lengths) == pytest.approx(np.median(data.encoded.lengths), rel=0.15)
    np.testing.assert_array_equal(data.sample(64).labels, part.labels)
    assert set(part.labels.tolist()) == {0, 1}
    assert len(data.sample(10_000).labels) == len(data.labels)


def test_offsets_of_more_tokens_than_int32_counts_do_not_wrap():
    """9 GB of text. The arrays of tokens are left out: only the offsets are asked for."""
    none = np.zeros(0, np.int32)
    for tokens, dtype in ((2**31 - 1, np.int32), (2**31, np.int64)):
        encoded = Encoded(none, none, np.array([0, tokens]), 0, 8, 0)
        offsets = ClassificationData(encoded, np.zeros(1, np.int32), 1, (8,), 0).device_data["offsets"]
        assert (offsets.tolist(), offsets.dtype) == ([0, tokens], dtype)
