"""The search for a learning rate: which rate is taken, and what the report says of it."""

from jaxpeft.comparison.grid import CompareConfig
from jaxpeft.comparison.records import Search
from jaxpeft.comparison.report import notes, search_row
from jaxpeft.comparison.summary import Summary


def test_the_best_rate_is_the_smallest_of_equal_ones_and_failed_ones_do_not_count():
    search = Search("words", "lora", "accuracy", {1e-3: 0.5, 1e-2: 0.7, 1e-1: 0.7, 1.0: None})
    assert search.best == 1e-2
    assert not search.at_the_edge
    assert search_row(search) == {
        "task": "words",
        "method": "lora",
        "metric": "accuracy",
        "tried": [("0.001", "0.5", False), ("0.01", "0.7", True), ("0.1", "0.7", False), ("1", "failed", False)],
        "edge": False,
    }


def test_a_score_that_was_negated_is_written_as_it_was():
    row = search_row(Search("words", "lora", "loss", {1e-3: -0.5, 1e-2: -0.7}))
    assert row["tried"] == [("0.001", "0.5", True), ("0.01", "0.7", False)]
    assert row["edge"]


def test_the_report_says_by_which_metric_validation_chose():
    config = CompareConfig(tasks={"words": {}, "numbers": {}}, methods={"lora": {"learning_rates": [1e-3]}})
    found = [Search(task, "lora", metric, {1e-3: 0.5}) for task, metric in (("words", "f1"), ("numbers", "pearson"))]
    said = notes(Summary(config, {}, found, [], []))
    assert (
        "Validation chose learning rates and adapters by one metric: F1 (words), Pearson correlation (numbers)." in said
    )


def test_a_method_whose_runs_all_failed_is_reported_without_a_metric():
    search = Search("words", "lora", None, {1e-3: None, 1e-2: None})
    assert search.best is None
    row = search_row(search)
    assert (row["metric"], row["edge"]) == ("", False)
    assert row["tried"] == [("0.001", "failed", False), ("0.01", "failed", False)]
