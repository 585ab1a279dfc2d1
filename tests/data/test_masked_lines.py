"""Whole-word masking, and masked language modelling line by line."""

import numpy as np
import pytest
import tiny_runs

from jaxpeft.data import masked_lines, masked_lm_data
from jaxpeft.data.whole_words import choose_words, word_starts
from jaxpeft.errors import InputError
from jaxpeft.models.tokenizers import load_tokenizer

TEXTS = [*tiny_runs.SENTENCES[:60], "", "   ", "Unbelievably antidisestablishmentarianism"]
OPTIONS = {"batch_size": 8, "ratio": 0.15, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_runs.package_model())


def words_of(tokenizer, row):
    """The words of a row as lists of positions, by the tokenizer's own marks."""
    words = []
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(row.tolist())):
        if token.startswith("##") and words:
            words[-1].append(place)
        else:
            words.append([place])
    return words


def test_masks_cover_whole_words_and_nothing_else(tokenizer):
    data = masked_lm_data(TEXTS, tokenizer, length=48, whole_words=True, **OPTIONS)
    several = 0
    for step in range(data.batches_per_epoch):
        draw, batch = data.draw(step), data.train_batch(step)
        for i, row in enumerate(draw["rows"]):
            chosen = set(batch["positions"][i][batch["weights"][i] > 0].tolist())
            words = [
                set(word) for word in words_of(tokenizer, data.blocks[row])[1:]
            ]  # the first may begin in the row before
            several += sum(len(word) > 1 and word <= chosen for word in words)
            assert all(word <= chosen or not word & chosen for word in words)
            wanted = round(0.15 * data.can_mask[row].sum())
            assert wanted - 3 <= len(chosen) <= wanted or not len(chosen)
    assert several > 2
    again = masked_lm_data(TEXTS, tokenizer, length=48, whole_words=True, **OPTIONS)
    np.testing.assert_array_equal(data.train_batch(2)["input_ids"], again.train_batch(2)["input_ids"])


def test_words_are_chosen_evenly_and_a_long_word_is_skipped():
    begins = np.array([[True, True, False, False, True, True, True, True, True, True]])
    counts = np.zeros(10)
    for seed in range(2000):
        positions, used = choose_words(begins, np.ones_like(begins), np.random.default_rng(seed), 0.2, 4)
        assert used.sum() == 2  # the word of three tokens never fits
        counts[positions[0][used[0]]] += 1
    assert counts[1:4].sum() == 0
    assert counts[[0, 4, 5, 6, 7, 8, 9]].min() > 0.8 * 2 * 2000 / 7


def test_a_row_of_one_long_word_is_masked_up_to_the_limit():
    begins = np.array([[True, True, False, False, False, False, True]])
    can_mask = np.array([[False, True, True, True, True, True, False]])
    positions, used = choose_words(begins, can_mask, np.random.default_rng(0), 0.15, 3)
    assert positions[used].tolist() == [1, 2, 3]
    nothing = choose_words(begins, np.zeros_like(can_mask), np.random.default_rng(0), 0.15, 3)[1]
    assert not nothing.any()


class Vocabulary:
    """A tokenizer's vocabulary, and nothing else."""

    all_special_ids = (0,)

    def __init__(self, *tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] for i in ids]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (("[CLS]", "play", "##ing", ","), [True, True, False, True]),
        (("<s>", "Ġplay", "ing", ","), [True, True, False, False]),
        (("<s>", "▁play", "ing", "▁a"), [True, True, False, True]),
    ],
)
def test_vocabularies_mark_words_in_three_ways(tokens, expected):
    assert word_starts(Vocabulary(*tokens)).tolist() == expected


def test_a_vocabulary_without_marks_is_refused():
    with pytest.raises(InputError, match=r"data\.whole_word_masking: the vocabulary of Vocabulary .* set it to false"):
        word_starts(Vocabulary("[CLS]", "a", "b"))


def test_every_line_is_a_row_in_the_shortest_bucket(tokenizer):
    data = masked_lines(TEXTS, tokenizer, length=32, bucket_lengths=(8, 16), **OPTIONS)
    lines = [tokenizer(text, truncation=True, max_length=32)["input_ids"] for text in TEXTS if text.strip()]
    assert [row[row != tokenizer.pad_token_id].tolist() for row in data.blocks] == lines
    assert data.num_truncated == sum(len(tokenizer(text)["input_ids"]) > 32 for text in TEXTS)
    assert {length for _, length in data.batch_shapes} <= {8, 16, 32}
    seen = []
    for step in range(data.batches_per_epoch):
        batch, draw = data.train_batch(step), data.draw(step)
        assert batch["input_ids"].shape in data.batch_shapes
        real = batch["weights"].sum(axis=1) > 0
        seen += draw["rows"][real].tolist()
        for i, row in enumerate(draw["rows"]):
            whole = data.blocks[row][: batch["input_ids"].shape[1]]
            assert (data.blocks[row] != tokenizer.pad_token_id).sum() <= len(whole)
            if not real[i]:
                continue
            places = batch["positions"][i][batch["weights"][i] > 0]
            assert len(places) == max(1, round(0.15 * data.can_mask[row].sum()))
            np.testing.assert_array_equal(np.delete(batch["input_ids"][i], places), np.delete(whole, places))
            np.testing.assert_array_equal(batch["labels"][i][batch["weights"][i] > 0], whole[places])
    assert sorted(seen) == list(range(len(lines)))


def test_evaluation_masks_of_lines_do_not_depend_on_batches_or_seed(tokenizer):
    def masked(**changes):
        data = masked_lines(TEXTS, tokenizer, length=32, bucket_lengths=(8, 16), **{**OPTIONS, **changes})
        rows = {}
        for batch in data.eval_batches():
            for i in np.flatnonzero(batch["weights"].sum(axis=1)):
                used = batch["weights"][i] > 0
                rows[tuple(batch["input_ids"][i][batch["attention_mask"][i] > 0])] = batch["positions"][i][
                    used
                ].tolist()
        return rows

    one = masked()
    assert len(one) == sum(bool(text.strip()) for text in TEXTS)
    assert one == masked(batch_size=5, seed=9)


def test_a_sample_has_the_masks_of_the_whole_and_lines_of_all_lengths(tokenizer):
    data = masked_lm_data(TEXTS, tokenizer, length=16, **OPTIONS)
    whole, some = [np.concatenate([b["input_ids"] for b in d.eval_batches()]) for d in (data, data.sample(16))]
    assert len(some) == 16 < len(whole)
    np.testing.assert_array_equal(some, whole[:16])
    lines = masked_lines(TEXTS, tokenizer, length=32, bucket_lengths=(8, 16), **OPTIONS)
    lengths = [(d.blocks != tokenizer.pad_token_id).sum(axis=1) for d in (lines, lines.sample(16))]
    assert len(lengths[1]) == 16
    assert abs(lengths[1].mean() - lengths[0].mean()) < 3


def test_a_run_on_lines_with_whole_words(tmp_path_factory):
    root = tiny_runs.workplace(tmp_path_factory)
    flags = "--name lines --model.name base --data.train_file train.txt --data.join_texts false --data.whole_word_masking true"
    directory, results = tiny_runs.train(root, flags, "--data.bucket_lengths", "[8]")
    assert {shape.split(" x ")[1] for shape in results["compiled_shapes"]} <= {"8", "16"}
    card = (directory / "adapter" / "README.md").read_text()
    assert "at most 15 % of the real tokens of every row, in whole words" in card


def test_other_tasks_refuse_these_flags(tmp_path_factory, capsys):
    root = tiny_runs.workplace(tmp_path_factory)
    with pytest.raises(SystemExit) as stopped:
        tiny_runs.train(root, f"{tiny_runs.LABELS} --name refused", "--data.join_texts", "false")
    assert stopped.value.code == 2
    assert "data.join_texts false is for masked-lm" in capsys.readouterr().err
