"""The record of masks, by hand."""

import json

import numpy as np
import pytest

from jaxpeft.pruning.record import mask_record, ranks_left

A = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], bool)  # [d_in 2, r 4]
B = np.array([[1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]], bool)  # [r 4, d_out 3]


def test_a_record_by_hand():
    before = {"x/0/q": {"a": np.ones((2, 4), bool), "b": B}}
    record = mask_record(7, {"x/0/q": {"a": A, "b": B}}, before)
    assert record == {
        "step": 7,
        "kept": {"x/0/q:a": 3, "x/0/q:b": 2},
        "size": {"x/0/q:a": 8, "x/0/q:b": 12},
        "ranks": {"x/0/q": 1},  # rank 0; rank 1 has no entry in B, rank 2 none in A
        "churn": 5 / 20,
    }
    assert json.loads(json.dumps(record)) == record


def test_before_the_first_masks_nothing_was_pruned():
    masks = {"x": {"a": A, "b": B}}
    assert mask_record(1, masks, {})["churn"] == (5 + 10) / 20
    assert mask_record(2, masks, masks)["churn"] == 0
    assert mask_record(3, {}, {}) == {"step": 3, "kept": {}, "size": {}, "ranks": {}, "churn": 0}


def test_what_is_grown_again_counts_like_what_is_pruned():
    grown = A.copy()
    grown[0, 0], grown[0, 3] = False, True
    assert mask_record(1, {"x": {"a": grown}}, {"x": {"a": A}})["churn"] == 2 / 8


@pytest.mark.parametrize(
    ("masks", "ranks"),
    [
        ({"a": A, "b": B}, 1),
        ({"a": A}, 2),  # B is dense
        ({"b": B}, 2),
        ({"w1_b": A, "w1_a": B, "w2_b": A, "w2_a": np.ones((4, 3), bool)}, 2),  # LoHa: the fuller product
        ({"w1_b": A, "w1_a": B, "w2_b": A, "w2_a": np.zeros((4, 3), bool)}, 0),
        ({"w1": A, "w2_b": A, "w2_a": B}, 1),  # LoKr
        ({"e": np.array([[1, 0, 1]], bool)}, 2),  # AdaLoRA
        ({"kernel": A}, None),
        ({}, None),
    ],
)
def test_ranks(masks, ranks):
    assert ranks_left(masks) == ranks
