"""Pairs with scores: what a score may be, and that a query's rows stay together."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from jaxpeft.data import (
    ClassificationData,
    Encoded,
    QueryData,
    ReadOptions,
    Split,
    Tables,
    encode_scores,
    hold_out_queries,
    is_ranked,
    query_ids,
)
from jaxpeft.errors import InputError
from jaxpeft.tasks.pair_scoring import PairScoring


def encode(train, **options):
    return encode_scores({"train": train}, ReadOptions(**options))


@pytest.mark.parametrize(
    "values", [[1, 0, 1], ["1", "0", " 1.0"], [True, False, True], ["true", "False", "TRUE"], [1.0, 0.0, 1.0]]
)
def test_zeros_and_ones(values):
    found = encode(values)
    assert found.columns["train"].tolist() == [1, 0, 1]
    assert (found.columns["train"].dtype, found.num_labels, found.names) == (np.float32, 1, None)


def test_scores_between():
    np.testing.assert_allclose(encode([0.25, "0.5", 1, "1e-3"]).columns["train"], [0.25, 0.5, 1, 1e-3])


@pytest.mark.parametrize("value", [2, -0.5, "relevant", "1,0", 1e9, "007"])
def test_other_values_are_refused(value):
    with pytest.raises(
        InputError, match=rf"^train, row 2: the label {value!r} is not a number from 0 to 1; .*label_column"
    ):
        encode([1, value, 0] if not isinstance(value, str) else ["1", value, "0"])


@pytest.mark.parametrize("value", [None, "", -1, "-1"])
def test_a_missing_score_is_refused_or_left_out(value):
    with pytest.raises(InputError, match=r"train, row 2: the label is missing .* data\.drop_unlabelled true"):
        encode([1, value, 0])
    found = encode([1, value, 0], drop_unlabelled=True)
    assert found.columns["train"].tolist() == [1, 0]
    assert found.rows["train"].tolist() == [0, 2]
    assert found.notes == ("1 of 3 rows of train have no label and are left out",)


def test_queries_are_numbered_in_their_order():
    assert query_ids(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 0, 2, 1]


def test_a_query_is_ranked_if_it_has_a_relevant_text_among_several():
    labels, queries = np.array([1, 0, 0, 0, 1, 0.4, 0.5]), np.array([0, 0, 1, 1, 2, 3, 3])
    assert is_ranked(labels, queries).tolist() == [True, False, False, True]


def rows(number=40):
    """Queries of 1 to 4 texts, interleaved."""
    queries = [f"query {i * i % 13}" for i in range(number)]
    return Split(queries, [f"text {i}" for i in range(number)], np.asarray([i % 2 for i in range(number)], np.float32))


def test_whole_queries_are_held_out():
    split = rows()
    train, validation, note = hold_out_queries(split, "a.csv")
    assert not set(train.texts) & set(validation.texts)
    assert len(train) + len(validation) == 40
    number = len(set(split.texts))
    assert len(set(validation.texts)) == max(1, round(number / 10))
    assert note == (
        f"no validation split: all rows of a fixed random 1 of {number} queries of a.csv are held out ({len(validation)} of 40 rows)"
    )
    again = hold_out_queries(split, "a.csv")[1]
    assert list(again.pairs) == list(validation.pairs)
    with pytest.raises(InputError, match=r"a\.csv has only one query .*data\.validation_file"):
        hold_out_queries(Split(["q", "q"], ["a", "b"], np.array([1.0, 0.0])), "a.csv")


def test_a_sample_has_whole_queries():
    split = rows()
    lengths = np.full(40, 3)
    ids = np.arange(120, dtype=np.int32)
    encoded = Encoded(ids, np.zeros_like(ids), np.cumsum([0, *lengths]), 0, 8, 0)
    data = QueryData.of(ClassificationData(encoded, split.labels, 4, (8,), 0), split.texts)
    for number in (1, 8, 20, 40):
        part = data.sample(number)
        assert len(part.labels) == len(part.queries) <= max(number, np.bincount(data.queries).max())
        for query in set(part.queries.tolist()):
            kept = np.flatnonzero(data.queries == query)
            assert (part.queries == query).sum() == len(kept)
            first = part.encoded.input_ids[part.encoded.offsets[:-1]][part.queries == query]
            np.testing.assert_array_equal(first, 3 * kept)
        assert is_ranked(part.labels, part.queries).any()
    np.testing.assert_array_equal(data.sample(40).queries, data.queries)


def test_the_hub_s_class_labels_are_numbers():
    features = Features({"q": Value("string"), "t": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    values = {"q": [f"q{i // 4}" for i in range(40)], "t": [f"t{i}" for i in range(40)], "label": [1, 0, 0, 0] * 10}
    train = Dataset.from_dict(values, features=features)
    read = Tables({"train": train, "test": train}, {"train": "x [train]", "test": "x [test]"}, "hub", "x")
    found = PairScoring.read(read, ReadOptions(text_column="q", text_pair_column="t"))
    assert found.num_labels == 1
    assert found.label_names is None
    assert found.test.labels[:5].tolist() == [1, 0, 0, 0, 1]
    assert set(found.validation.texts).isdisjoint(found.train.texts)


def test_a_withheld_test_split_is_left_out():
    values = {"q": [f"q{i // 4}" for i in range(40)], "t": [f"t{i}" for i in range(40)], "label": [1, 0, 0, 0] * 10}
    train, test = Dataset.from_dict(values), Dataset.from_dict({**values, "label": [-1] * 40})
    read = Tables({"train": train, "test": test}, {"train": "x [train]", "test": "x [test]"}, "hub", "x")
    found = PairScoring.read(read, ReadOptions(text_column="q", text_pair_column="t"))
    assert found.test is None
    assert json.dumps(found.notes).count("not public") == 1
