"""What pruning kept, in the report's table and pictures."""

from dataclasses import fields
from xml.etree import ElementTree

import pytest

from jaxpeft.comparison.grid import Cell
from jaxpeft.comparison.pictures import draw
from jaxpeft.comparison.records import Record
from jaxpeft.comparison.report import cells
from jaxpeft.comparison.summary import Row
from jaxpeft.report.results import Results
from jaxpeft.runs.directory import RunDirectory

EMPTY = {"str": "", "int": 0, "float": 0.0, "str | None": None, "int | None": None, "list[str] | None": None}


def results(**values):
    """A `Results` with zeros and empty texts for what is not given."""
    given = {"task": "masked-lm", "test_split": "test", "seconds": 1.0, **values}
    kinds = {each.name: EMPTY.get(each.type, {} if each.type.startswith("dict") else []) for each in fields(Results)}
    return Results(**{**kinds, **given})


def row(tmp_path, number, kept, *, sparsity):
    runs = {}
    for seed, entries in enumerate(kept):
        found = results(
            parameters_trainable=1000,
            adapter_entries=800,
            adapter_entries_kept=entries,
            sparsity=sparsity,
            trained_together=1,
            test={"perplexity": 5.0 + number, "accuracy": 0.5},
        )
        runs[seed] = Record(Cell("words", "lora", 0.1, seed), RunDirectory(tmp_path / f"{number}-{seed}"), found)
    return Row("words", f"method-{number}", f"Method {number}", None, runs, None)


@pytest.mark.parametrize(("sparsity", "expected"), [(0.5, 602.0), (0.0, 1000.0)])
def test_kept_parameters_are_the_mean_over_the_seeds_and_only_pruning_takes_any(tmp_path, sparsity, expected):
    found = row(tmp_path, 0, [400, 404], sparsity=sparsity)
    assert found.kept_parameters == expected
    shown = {cell.head: cell.text for cell in cells(found, "lora")}
    assert (shown["trained"], shown["kept"]) == ("1,000", f"{expected:,.0f}")


def test_the_legend_of_many_methods_stands_beside_the_picture(tmp_path):
    def width(number):
        rows = [row(tmp_path, n, [400, 404], sparsity=0.5) for n in range(number)]
        pictures = draw(rows, tmp_path / str(number), "words")
        assert list(pictures) == ["words: perplexity against kept parameters"]
        (path,) = pictures.values()
        return float(ElementTree.parse(path).getroot().get("width").removesuffix("pt"))

    assert width(3) < width(12)
