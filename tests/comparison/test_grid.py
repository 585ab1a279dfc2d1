"""The grid: which runs a file asks for, and what it may not ask for."""

import pytest

from jaxpeft.comparison.grid import Cell, CompareConfig, cells_at, cost_run, head_run, merged, run_of, search_cells
from jaxpeft.errors import InputError

TASKS = {
    "words": {"data": {"name": "wikitext-2-raw-v1"}, "training": {"num_steps": 300}},
    "films": {"task": "classification", "data": {"name": "glue/sst2"}},
}
METHODS = {
    "lora": {"learning_rates": {"words": [1e-3, 3e-3], "films": [1e-3]}, "adapter": {"rank": 8, "alpha": 16}},
    "hira": {"learning_rates": ["1e-2", 3e-3], "adapter": {"method": "hira", "rank": 8, "alpha": None}},
}
BASE = {"model": {"dropout": 0.0}, "training": {"batch_size": 4, "num_steps": 10}, "adapter": {"alpha": 1.0}}


def compare(**changes):
    return CompareConfig(**{"tasks": TASKS, "methods": METHODS, "base": BASE, "seeds": [0, 1], **changes})


def test_the_search_has_every_rate_on_the_first_seeds():
    cells = search_cells(compare())
    assert [cell.name for cell in cells if cell.method == "lora"] == [
        "words-lora-lr0.001-seed0",
        "words-lora-lr0.003-seed0",
        "films-lora-lr0.001-seed0",
    ]
    assert {cell.seed for cell in cells} == {0}
    assert {cell.method for cell in cells} == {"lora", "hira", "full", "head"}
    assert sum(cell.method == "hira" for cell in cells) == 4
    assert {cell.seed for cell in search_cells(compare(search_seeds=2))} == {0, 1}


def test_full_and_head_are_always_rows_and_can_be_told_otherwise():
    assert compare().learning_rates("films", "full") == [2e-5, 5e-5, 1e-4]
    own = compare(methods={**METHODS, "full": {"learning_rates": [1e-4], "training": {"batch_size": 2}}})
    assert own.learning_rates("films", "full") == [1e-4]
    run = run_of(own, Cell("films", "full", 1e-4, 0))
    assert (run.adapter.method, run.training.batch_size) == ("full", 2)
    deeper = compare(methods={**METHODS, "head": {"adapter": {"rank": None}}})
    assert run_of(deeper, Cell("films", "head", 1e-3, 0)).adapter.method == "head"


def test_a_task_without_a_head_has_no_row_for_head():
    embeddings = {"task": "sentence-embeddings", "data": {"name": "glue/stsb"}}
    both = compare(
        tasks={"words": TASKS["words"], "pairs": embeddings}, methods={"hira": METHODS["hira"]}, baseline="hira"
    )
    methods = {task: {cell.method for cell in search_cells(both) if cell.task == task} for task in both.tasks}
    assert methods == {"words": {"hira", "full", "head"}, "pairs": {"hira", "full"}}
    for cell in search_cells(both):
        run_of(both, cell)


def test_all_seeds_at_the_best_rate():
    cells = cells_at(compare(), {("words", "lora"): 3e-3})
    assert [(cell.learning_rate, cell.seed) for cell in cells] == [(3e-3, 0), (3e-3, 1)]


def test_a_run_is_base_under_task_under_method():
    run = run_of(compare(), Cell("words", "lora", 3e-3, 1))
    assert (run.training.batch_size, run.training.num_steps, run.training.learning_rate) == (4, 300, 3e-3)
    assert (run.adapter.alpha, run.adapter.rank, run.model.dropout, run.seed) == (16, 8, 0.0, 1)
    assert (run.name, run.output_dir) == ("words-lora-lr0.003-seed1", "runs/comparison/runs")
    assert run_of(compare(), Cell("words", "hira", 3e-3, 1)).adapter.alpha is None


def test_what_a_run_starts_from_is_tested_where_the_file_wants_it():
    assert not run_of(compare(), Cell("words", "lora", 3e-3, 1)).evaluation.before
    wanted = compare(base={"evaluation": {"before": True}})
    assert run_of(wanted, Cell("words", "lora", 3e-3, 1)).evaluation.before


def test_the_cost_is_of_a_short_run_of_the_same():
    run = cost_run(compare(), "films", "lora")
    assert (run.training.num_steps, run.training.batch_size, run.task) == (40, 4, "classification")
    assert run.output_dir == "runs/comparison/costs"
    assert run.training.learning_rate == 1e-5  # costs do not depend on it, and this one diverges nowhere
    ranks = {
        **METHODS,
        "adalora": {"learning_rates": [1e-3], "adapter": {"method": "adalora", "rank": None, "alpha": None}},
    }
    assert cost_run(compare(methods=ranks), "films", "adalora").adapter.tfinal == 2
    redrawn = {"adapter": {"method": "shira", "rank": 8, "alpha": None}, "pruning": {"schedule": "rigl"}}
    methods = {**METHODS, "redrawn": {**redrawn, "learning_rates": [1e-3]}}
    assert cost_run(compare(methods=methods), "films", "redrawn").pruning.every_steps == 8


def test_the_head_for_forgetting_is_trained_on_general_text():
    run = head_run(compare())
    assert (run.task, run.adapter.method, run.data.name) == ("masked-lm", "head", "python-docs")
    assert run.model.dropout == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\]; it must be different numbers"),
        ({"search_seeds": 3}, "search_seeds is 3; it must be from 1 to 2"),
        ({"tasks": {}}, "tasks is {}; it must be at least one task"),
        ({"together": 0}, "together is 0; it must be at least 1"),
        ({"baseline": "lroa"}, "baseline 'lroa' is not among the methods.*lora"),
        ({"methods": {**METHODS, "dora": {}}}, "methods.dora.learning_rates has none for task 'words'"),
        ({"methods": {"lora": {"learning_rates": {"words": [1e-3]}}}}, "has none for task 'films'"),
        ({"methods": {**METHODS, "full": {"adapter": {"method": "lora"}}}}, "methods.full.adapter.method is 'lora'"),
        ({"tasks": {"glue/sst2": {}}}, "'glue/sst2' becomes part of file names"),
        (
            {
                "tasks": {"a": {}, "a-b": {}},
                "methods": {"b-c": {"learning_rates": [1]}, "c": {"learning_rates": [1]}},
                "baseline": "c",
            },
            "two runs would have the name 'a-b-c-lr1-seed0'",
        ),
        ({"methods": {"lora": {"learning_rates": ["fast"]}}}, r"methods.lora.learning_rates is \['fast'\]"),
    ],
)
def test_what_cannot_be_compared(changes, message):
    with pytest.raises(InputError, match=message):
        compare(**changes)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"adapter": {"rnak": 8}}, "task 'words', method 'lora': .*rnak.*adapter.rank"),
        ({"adapter": {"rank": "many"}}, "task 'words', method 'lora': .*rank"),
        ({"adapter": {"rank": 0}}, "adapter.rank is 0"),
    ],
)
def test_a_run_that_cannot_be_is_named_with_its_place(section, message):
    config = compare(methods={"lora": {"learning_rates": [1e-3], **section}})
    with pytest.raises(InputError, match=message):
        run_of(config, Cell("words", "lora", 1e-3, 0))


def test_merging_leaves_its_arguments_alone():
    below, above = {"a": {"b": 1, "c": [1]}}, {"a": {"b": 2}}
    result = merged(below, above)
    assert result == {"a": {"b": 2, "c": [1]}}
    result["a"]["c"].append(2)
    assert below == {"a": {"b": 1, "c": [1]}}
