"""The log of the masks: read, and drawn."""

import json

import pytest
import tiny
import tiny_runs
from tiers import slow

from jaxpeft import InputError
from jaxpeft.pruning import prune
from jaxpeft.pruning.record import mask_record
from jaxpeft.report.sparsity import plot_sparsity, ranks_by_place, read_records

PATHS = [f"bert/encoder/layer/{i}/attention/self/{name}" for i in (0, 2, 10) for name in ("query", "value")]


def records(paths=(*PATHS, "pooler/dense")):
    sites = {path: {"a": tiny.normal(i, 8, 4), "b": tiny.normal(i + 50, 4, 8)} for i, path in enumerate(paths)}
    found, masks = [], {}
    for step, sparsity in ((10, 0.5), (20, 0.8), (30, 0.95)):
        new = prune(sites, sparsity)
        found.append(mask_record(step, new, masks))
        masks = new
    return found


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_records_come_back(tmp_path):
    assert read_records(write(tmp_path / "sparsity.jsonl", records())) == records()
    assert read_records(tmp_path / "nothing.jsonl") == []


def test_a_resumed_run_counts_once_and_a_line_cut_off_not_at_all(tmp_path):
    first, second, third = records()
    old = {**second, "churn": 0.123}
    path = write(tmp_path / "sparsity.jsonl", [first, old, third, second], '{"step": 40, "ke')
    assert read_records(path) == [first, second, third]


@pytest.mark.parametrize("row", [{"step": 1, "split": "train"}, [1, 2], 3])
def test_another_file_is_refused(tmp_path, row):
    with pytest.raises(InputError, match="has a line without step, kept, size, churn"):
        read_records(write(tmp_path / "sparsity.jsonl", [row]))


def test_the_map_of_ranks():
    layers, modules, ranks = ranks_by_place(records()[-1])
    assert layers == ["–", "0", "2", "10"]
    assert modules == ["attention.self.query", "attention.self.value", "pooler.dense"]
    assert ranks["10", "attention.self.value"] == records()[-1]["ranks"][PATHS[-1]]
    assert len(ranks) == len(PATHS) + 1


def heights(tmp_path, rows):
    path = plot_sparsity(rows, tmp_path / "sparsity.png", "a run")
    return int.from_bytes(path.read_bytes()[20:24], "big")


def test_the_picture_has_a_map_only_if_there_are_ranks(tmp_path):
    without = [{key: value for key, value in record.items() if key != "ranks"} for record in records()]
    assert heights(tmp_path, records()) > heights(tmp_path, without) + 200
    assert heights(tmp_path, records()[:1]) > 0


@slow
def test_a_run_draws_its_log_and_shows_it_in_the_card(tmp_path_factory, capsys):
    root = tiny_runs.workplace(tmp_path_factory)
    flags = "--name drawn --model.name base --data.train_file train.txt --training.num_steps 2"
    directory, _ = tiny_runs.train(root, flags)
    card = directory / "adapter" / "README.md"
    assert "sparsity.png" not in card.read_text() + capsys.readouterr().out
    write(directory / "sparsity.jsonl", records())
    (directory / "results.json").unlink()
    tiny_runs.train(root, f"{flags} --resume")  # nothing is left to do but to write the files
    assert "](sparsity.png)" in card.read_text()
    assert (directory / "sparsity.png").read_bytes() == (directory / "adapter" / "sparsity.png").read_bytes()
    assert "curves.png, sparsity.png, sparsity.jsonl, results.json" in capsys.readouterr().out
