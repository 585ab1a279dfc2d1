"""Rows of two and three texts: what is read, how the texts of a batch follow each other, and which are equal."""

import json

import numpy as np
import pytest

from jaxpeft.data import ReadOptions, Split, read_sentence_pairs, read_tables, sentence_pair_data
from jaxpeft.errors import InputError

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def texts(start, number=12):
    """Texts of 3 to 8 tokens."""
    return [" ".join(WORDS[(start + i) % 12 :][: 1 + i % 6]) or "x" for i in range(number)]


@pytest.fixture(scope="module")
def triplets(tokenizer):
    split = Split(texts(0), texts(1), negatives=texts(2))
    return split, build(split, tokenizer)


def build(split, tokenizer, **options):
    given = {"max_length": 8, "batch_size": 5, "seed": 3, "bucket_lengths": [4, 6], **options}
    return sentence_pair_data(split, tokenizer, **given)


def rows_of(batch, number):
    """The token ids of each row of a batch, without padding: `number` lists for each."""
    ids, mask = batch["input_ids"], batch["attention_mask"] > 0
    alone = [ids[i][mask[i]].tolist() for i in range(len(ids))]
    return [alone[i : i + number] for i in range(0, len(alone), number)]


def test_the_texts_of_a_row_follow_each_other(triplets, tokenizer):
    split, data = triplets
    expected = [
        tokenizer(list(row), truncation=True, max_length=8)["input_ids"] for row in zip(*split.columns, strict=True)
    ]
    seen = []
    for batch in data.eval_batches():
        assert batch["input_ids"].shape[0] == 3 * len(batch["weights"]) == 15
        for row, found in zip(batch["rows"], rows_of(batch, 3), strict=True):
            assert found == expected[max(row, 0)]
            seen += [row] if row >= 0 else []
        np.testing.assert_array_equal(batch["weights"], batch["rows"] >= 0)
    assert sorted(seen) == list(range(12))


def test_a_batch_is_a_function_of_the_micro_step(triplets, tokenizer):
    split, data = triplets
    assert data.batch_shapes == {(15, length) for length in {b["input_ids"].shape[1] for b in epoch(data)}}
    for step in range(2 * data.batches_per_epoch):
        again = build(split, tokenizer).train_batch(step)
        for name, array in data.train_batch(step).items():
            np.testing.assert_array_equal(array, again[name])
    assert any(
        (a["text_ids"] != b["text_ids"]).any() for a, b in zip(epoch(data), epoch(data.with_seed(4)), strict=True)
    )


def epoch(data):
    return [data.train_batch(step) for step in range(data.batches_per_epoch)]


def test_a_row_is_in_the_bucket_of_its_longest_text(tokenizer):
    data = build(Split(["one", "one"], ["one two three four", "one"]), tokenizer, batch_size=1)
    assert sorted(batch["input_ids"].shape for batch in epoch(data)) == [(2, 4), (2, 6)]


def test_equal_numbers_mean_equal_tokens(tokenizer):
    """Case is not in the vocabulary, and what is cut off is not there."""
    long = " ".join(WORDS)
    data = build(Split(["One", long, "two"], ["one", long + " more", "three"]), tokenizer)
    (one, also_one), (cut, also_cut), (two, three) = data.text_ids.tolist()
    assert one == also_one
    assert cut == also_cut
    assert len({one, cut, two, three}) == 4
    assert data.num_truncated == 2  # texts


def test_a_sample_is_some_of_the_rows(triplets):
    _, data = triplets
    some = data.sample(7)
    rows = data._sampled(7)
    assert len(some.labels) == 7
    np.testing.assert_array_equal(some.text_ids, data.text_ids[rows])
    for place, row in enumerate(rows):
        for text in range(3):
            ours, theirs = 3 * place + text, 3 * row + text
            np.testing.assert_array_equal(
                some.encoded.input_ids[slice(*some.encoded.offsets[ours : ours + 2])],
                data.encoded.input_ids[slice(*data.encoded.offsets[theirs : theirs + 2])],
            )


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        (Split([], []), {}, "there are no texts to embed"),
        (Split(["a"], ["b"]), {"batch_size": 0}, "batch size 0 is too small"),
        (Split(["a"], ["b", "c"]), {}, "columns of 1 and 2 texts; give as many in each"),
    ],
)
def test_wrong_rows(split, options, message, tokenizer):
    with pytest.raises(InputError, match=message):
        build(split, tokenizer, **options)


def read(tmp_path, rows, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_sentence_pairs(read_tables(train_file=str(file)), ReadOptions(**options))


def rows_with(**columns):
    return [
        {name: f"{value} {i}" if isinstance(value, str) else i / 20 for name, value in columns.items()}
        for i in range(20)
    ]


def test_pairs(tmp_path):
    found = read(tmp_path, rows_with(question="q", answer="a"), text_column="question", text_pair_column="answer")
    assert (len(found.train), len(found.validation)) == (18, 2)
    assert found.train.pairs[0] == "a 0"
    assert found.train.negatives is None
    assert found.train.labels is None
    assert found.num_labels is None


def test_the_usual_columns_are_found(tmp_path):
    found = read(tmp_path, rows_with(negative="n", anchor="a", positive="p"))
    assert [column[3] for column in found.train.columns] == ["a 3", "p 3", "n 3"]
    assert [column[0] for column in found.validation.columns] == ["a 18", "p 18", "n 18"]
    found = read(tmp_path, rows_with(sentence1="a", sentence2="b", score=0.0))
    assert found.num_labels == 1
    assert found.train.labels.dtype == np.float32


def test_negatives_are_part_of_the_rows(tmp_path):
    options = {"text_column": "a", "text_pair_column": "b", "negative_column": "c"}
    one, other = (read(tmp_path, rows_with(a="a", b="b", c=c), **options) for c in ("c", "d"))
    assert one.train.negatives[2] == "c 2"
    assert one.digest() != other.digest()
    assert one.digest() == read(tmp_path, rows_with(a="a", b="b", c="c"), **options).digest()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            rows_with(text="a"),
            {},
            "sentence-embeddings needs two texts in each row, and only 'text' is known; name the second column with "
            "data.text_pair_column; columns: text",
        ),
        (
            rows_with(a="a", b="b", label="no number"),
            {"text_column": "a", "text_pair_column": "b"},
            "row 1: the label 'no number 0' is not a number; correct it, or name another column with data.label_column",
        ),
        (
            rows_with(anchor="a", positive="b", negative="c", label=1.0),
            {},
            r"a row has a number \('label'\) or a third text \('negative'\), not both; remove one of the columns",
        ),
        (
            rows_with(a="a", b="b"),
            {"text_column": "a", "text_pair_column": "b", "negative_column": "d"},
            "data.negative_column='d': .* has no such column",
        ),
        (
            [*rows_with(anchor="a", positive="b"), {"anchor": "a", "positive": " "}],
            {},
            r"1 of 21 rows have no text in one of their 2 columns \(row 21\); fill them in, or set data.drop_empty to true",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(rows, options, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, rows, **options)
    assert "\n" not in str(caught.value)


def test_rows_without_a_text_are_left_out_if_asked(tmp_path):
    rows = [*rows_with(anchor="a", positive="b"), {"anchor": "a", "positive": None}, {"anchor": "", "positive": "b"}]
    found = read(tmp_path, rows, empty_texts="drop")
    assert len(found.train) + len(found.validation) == 20
    assert "2 of 22 rows of" in found.notes[0]


def test_classes_are_no_numbers(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict(
        {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]},
        features=datasets.Features(
            {
                "sentence1": datasets.Value("string"),
                "sentence2": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["entailment", "not_entailment"]),
            }
        ),
    )
    table.to_parquet(tmp_path / "classes.parquet")
    with pytest.raises(
        InputError, match=r"column 'label' holds classes \(entailment, not_entailment\), and sentence-emb"
    ):
        read_sentence_pairs(read_tables(train_file=str(tmp_path / "classes.parquet")), ReadOptions())
