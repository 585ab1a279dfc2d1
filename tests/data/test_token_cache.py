"""Rows that are tokenised once: the same as without a cache, and no damage or race changes them."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest

from jaxpeft.data import PackedData, TokenCache, classification_data, load_file, load_splits, masked_lm_data
from jaxpeft.data import token_cache as module
from jaxpeft.data.token_cache import Chunk, Origin
from jaxpeft.errors import InputError

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "unbelievably", "saw", "<unk>", "other", "cats"]
ROWS = [" ".join(WORDS[i % 5 : i % 11]) for i in range(2500)]  # some are empty, and they are more than a chunk


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return TokenCache(tmp_path / "tokens", said.append)


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": text, "pair": ROWS[-i], "label": i % 3} for i, text in enumerate(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_file(str(path), text_column="text", text_pair_column="pair")


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return len(self.tokenizer)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.tokenizer(*args, **options)


def masked(texts, tokenizer, cache=None, length=16):
    return masked_lm_data(texts, tokenizer, length=length, batch_size=8, ratio=0.15, seed=3, cache=cache)


def classified(split, tokenizer, cache=None, **changes):
    options = {"max_length": 16, "batch_size": 8, "seed": 3, "bucket_lengths": (8,), "cache": cache} | changes
    return classification_data(split.texts, split.pairs, split.labels, tokenizer, **options)


def assert_same_batches(first, second):
    """Bit for bit, in training and in evaluation."""
    assert first.batch_shapes == second.batch_shapes
    for micro_step in (0, 1, first.batches_per_epoch - 1, first.batches_per_epoch):
        assert_same(first.train_batch(micro_step), second.train_batch(micro_step))
    if hasattr(first, "eval_batches"):
        for one, other in zip(first.eval_batches(), second.eval_batches(), strict=True):
            assert_same(one, other)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value.dtype, value.shape) == (second[name].dtype, second[name].shape)
        np.testing.assert_array_equal(value, second[name])


def files(cache):
    return sorted(cache.directory.iterdir())


def test_masked_rows_are_those_without_a_cache(split, tokenizer, cache):
    plain, counting = masked(ROWS, tokenizer), Counting(tokenizer)
    assert_same_batches(plain, masked(split.texts, counting, cache))
    calls = counting.calls
    again = masked(split.texts, counting, cache)
    assert counting.calls == calls == 3, "one for each 1024 texts, and none the second time"
    assert_same_batches(plain, again)
    assert again.blocks.base is not None
    assert again.blocks.ctypes.data % 64 == 0, "jax would copy it"
    with pytest.raises(ValueError, match="read-only"):
        again.blocks[0, 0] = 1


def test_classified_rows_are_those_without_a_cache(split, tokenizer, cache):
    plain, counting = classified(split, tokenizer), Counting(tokenizer)
    assert_same_batches(plain, classified(split, counting, cache))
    calls = counting.calls
    again = classified(split, counting, cache)
    assert counting.calls == calls
    assert again.num_truncated == plain.num_truncated > 0
    assert_same_batches(plain, again)
    assert_same_batches(PackedData(plain, 16), PackedData(again, 16))
    assert_same_batches(plain.sample(100), again.sample(100))


def test_any_table_library_reads_a_file(split, tokenizer, cache):
    data = classified(split, tokenizer, cache)
    table = datasets.Dataset.from_file(str(files(cache)[0]))
    assert table.column_names == ["input_ids", "token_type_ids"]
    offsets = data.encoded.offsets
    assert table[7]["input_ids"] == data.encoded.input_ids[offsets[7] : offsets[8]].tolist()


def test_what_decides_the_rows_decides_the_file(split, tokenizer, cache, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "cased")
    other = AutoTokenizer.from_pretrained(tmp_path / "cased", do_lower_case=False)
    masked(split.texts, tokenizer, cache)
    masked(split.texts, tokenizer, cache, length=12)
    masked(split.texts[:-1], tokenizer, cache)
    masked(split.texts, other, cache)
    classified(split, tokenizer, cache)
    assert len(files(cache)) == 5


def test_what_does_not_decide_the_rows(split, tokenizer, cache, tmp_path):
    (tmp_path / "moved.jsonl").write_text("\n".join(json.dumps({"sentence": text}) for text in ROWS))
    classified(split, tokenizer, cache)  # it leaves its limit in the tokenizer
    one = Origin("blocks", (split.texts,), tokenizer, 16).fingerprint()
    tokenizer("a text", truncation=True, max_length=5)
    assert Origin("blocks", (load_file(str(tmp_path / "moved.jsonl")).texts,), tokenizer, 16).fingerprint() == one
    assert Origin("blocks", (ROWS,), tokenizer, 16).fingerprint() == one
    classified(split, tokenizer, cache, seed=4, batch_size=2, bucket_lengths=(4,))
    assert len(files(cache)) == 1


def test_boundaries_of_texts_count(tokenizer):
    whole, cut = (Origin("texts", (texts,), tokenizer, 16).fingerprint() for texts in (["ab", "c"], ["a", "bc"]))
    assert whole != cut


def test_lists_are_not_kept(tokenizer, cache):
    masked(ROWS, tokenizer, cache)
    assert not cache.directory.exists()


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign"])
def test_damage_is_noticed(split, tokenizer, cache, said, damage):
    data = masked(split.texts, tokenizer, cache)
    (path,) = files(cache)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[: len(content) // 2], "changed": content, "empty": b"", "foreign": b"text " * 100}
    path.unlink()  # the rows above are still mapped
    path.write_bytes(damaged[damage])
    assert_same_batches(data, masked(split.texts, tokenizer, cache))
    assert len(said) == 1
    assert str(path) in said[0]
    assert "is damaged" in said[0]
    assert "tokenised again" in said[0]
    masked(split.texts, tokenizer, cache)
    assert len(said) == 1, "the file is whole again"


def test_a_run_that_is_killed_leaves_no_file(split, tokenizer, cache, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", killed)  # when everything is written
        with pytest.raises(KeyboardInterrupt):
            masked(split.texts, tokenizer, cache)
    assert not files(cache)
    old, new = (cache.directory / f"{name}.unfinished" for name in ("old", "new"))
    old.write_text("")
    new.write_text("")
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    masked(split.texts, tokenizer, cache)
    assert new.exists(), "another run may be writing it"
    assert not old.exists()


def test_runs_that_start_at_once(split, tokenizer, cache, said):
    plain = masked(ROWS, tokenizer)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: masked(split.texts, tokenizer, cache), range(4)))
    for data in found:
        assert_same_batches(plain, data)
    assert not said
    assert len(files(cache)) == 1


def test_a_full_disk_is_said(split, tokenizer, cache, said, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    assert_same_batches(masked(ROWS, tokenizer), masked(split.texts, tokenizer, cache))
    assert said == [
        f"warning: no tokens are kept in {cache.directory}: No space left on device; "
        "give a directory as data.token_cache, or null"
    ]


def test_errors_are_those_without_a_cache(tmp_path, tokenizer, cache):
    (tmp_path / "zero.txt").write_text("\u200b\n")
    texts = load_file(str(tmp_path / "zero.txt")).texts
    with pytest.raises(InputError, match="1 texts hold no tokens"):
        masked(texts, tokenizer, cache)
    assert not files(cache)


def test_a_column_is_a_sequence(split, tmp_path):
    texts = split.texts
    assert texts == ROWS
    assert texts != ROWS[1:]
    assert (len(texts), texts[3], texts[-1]) == (len(ROWS), ROWS[3], ROWS[-1])
    assert texts[10:2000:7][3:] == ROWS[10:2000:7][3:]
    assert ROWS[5] in texts
    with pytest.raises(IndexError):
        texts[len(ROWS)]
    splits = load_splits(train_file=str(tmp_path / "rows.jsonl"), text_column="text")
    assert sorted([*splits.train.texts, *splits.validation.texts]) == sorted(ROWS)
    assert splits.digest() == load_splits(train_file=str(tmp_path / "rows.jsonl"), text_column="text").digest()


def test_chunks_are_joined(cache):
    made = [Chunk({"a": np.arange(n, dtype=np.int32)}, np.array([n]), 1) for n in (3, 0, 2)]
    rows = module.collect(["a"], made)
    np.testing.assert_array_equal(rows.tokens["a"], [0, 1, 2, 0, 1])
    np.testing.assert_array_equal(rows.offsets, [0, 3, 3, 5])
    assert rows.num_truncated == 3
    cache.directory.mkdir()
    for number in (0, 1, 3):
        module._write(cache.directory / "some", ["a"], made[:number])
        written, kept = module._read(cache.directory / "some", ["a"]), module.collect(["a"], made[:number])
        np.testing.assert_array_equal(written.tokens["a"], kept.tokens["a"])
        np.testing.assert_array_equal(written.offsets, kept.offsets)
        assert written.num_truncated == kept.num_truncated
