"""The bench of growth: the files it makes, what it says, that it can be continued, and one tiny measurement end to end."""

import json
import sys
from pathlib import Path

import pytest
import tiny_runs
from compiling import COMPILE_FAST

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import benchmarks.growth.__main__ as growth  # noqa: E402
from benchmarks.growth.pictures import draw  # noqa: E402
from benchmarks.growth.questions import Start, Work, questions  # noqa: E402
from benchmarks.growth.steps import case_of, method_of  # noqa: E402
from benchmarks.growth.table import bound, report  # noqa: E402
from benchmarks.growth.texts import write_file  # noqa: E402

MEASURED = {"at": "2026-01-01 00:00 UTC", "commit": "abc"}
MACHINE = {"cpu": "A CPU", "cores": 2, "memory_gib": 8, "system": "Linux x86_64", "python": "3.11"}


def figures(point, i):
    """Figures made up: `i` seconds, and 1 GB and a tenth of `i`."""
    common = {"seconds": float(i), "peak_bytes": 1_000_000_000 + 100_000_000 * i, "measured": MEASURED}
    if isinstance(point, Work):
        return {**common, "seconds_spread": [i - 0.5, i + 0.5], "rows_per_pass": 8, "trained": 73728}
    return {**common, "anonymous_bytes": 900_000_000, "data_bytes": 10, "token_bytes": 2_000_000}


def record_of(asked):
    points = {point.key: point for question in asked.values() for point in question.points}
    measured = {key: figures(point, i) for i, (key, point) in enumerate(points.items(), 1)}
    return {"device": "cpu", "tiny": False, "machine": MACHINE, "versions": {"jax": "0.10"}, "points": measured}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("wikitext-2", "sst2"):
        (folder / name).mkdir(parents=True)
    for split in ("train", "valid"):
        lines = [f"{split} {line}" for line in tiny_runs.SENTENCES[:80]]
        (folder / "wikitext-2" / f"{split}.txt").write_text("\n \n".join(lines) + "\n")
    rows = "".join(f"{line.split(chr(9))[0]}\t{i % 2}\n" for i, line in enumerate(tiny_runs.SENTENCES[:40]))
    (folder / "sst2" / "train-sentences.tsv").write_text(rows)
    (folder / "sst2" / "dev.tsv").write_text("sentence\tlabel\n" + rows)
    return folder


def test_every_question_of_the_benchmark_has_its_points():
    asked = questions()
    assert [x for x, _ in asked["rows"].lines["passes as the run decides"]] == [4, 8, 16, 32, 64, 128]
    assert [x for x, _ in asked["text"].lines["first start"]] == [5, 50, 500]
    assert asked["classification"].points[-1] == Start("classification", 1_000_000, again=True)
    for question in asked.values():
        assert all([x for x, _ in line] == sorted(x for x, _ in line) for line in question.lines.values())
    keys = [point.key for question in asked.values() for point in question.points]
    assert len(set(keys)) < len(keys), "questions share points, and a shared one is measured once"
    assert len(growth.missing({"points": {}}, asked, again=False)) == len(set(keys))


def test_a_point_is_a_case_of_the_bench_of_speed():
    work = Work(rows=4, rank=16, adapted=(4, 5), one_pass=True)
    case, method = case_of(work), method_of(work)
    assert (case.rows, case.length, case.model["num_hidden_layers"]) == (4, 128, 6)
    assert method.adapter == {"rank": 16, "alpha": 32, "layers_to_transform": [4, 5]}
    assert method.training == {"micro_batch_size": 4}
    assert method_of(Work()).training == {}
    assert (Work(rows=4).steps_per_round, Work().steps_per_round, Work(rows=128).steps_per_round) == (16, 4, 2)


def test_files_have_the_size_that_was_asked_for(data, tmp_path):
    text = write_file("masked-lm", data, 20_000, tmp_path)
    assert 20_000 <= text.stat().st_size < 21_000
    lines = text.read_text().splitlines()
    assert all(line.strip() for line in lines)
    assert set(lines[:80]) == set(lines[80:160])
    assert lines[:80] != lines[80:160]
    assert len(write_file("classification", data, 100, tmp_path).read_text().splitlines()) == 100


def test_the_report_says_what_the_record_says(tmp_path):
    asked = questions()
    record = record_of(asked)
    text = report(record, asked)
    assert "| 4 | passes as the run decides | 1 | 0.5 to 1.5 | 1.10 | 8 | 73,728 |" in text
    assert "| 500 | first start |" in text
    assert "| 1,000,000 | second start |" in text
    assert "Measured 2026-01-01 00:00 UTC, commit abc." in text
    # Starts of a text are one after the other: three sizes first, then the same again.
    assert bound(record, asked) == pytest.approx(0.2e9)
    assert "From the smallest to the largest text 0.20 GB more; the bound is 1.5 GB: met." in text
    del (
        record["points"][Start("masked-lm", 500_000_000).key],
        record["points"][Start("masked-lm", 500_000_000, again=True).key],
    )
    assert bound(record, asked) is None
    assert "the bound is" not in report(record, asked)


def test_every_line_of_a_picture_has_its_name(tmp_path):
    asked = questions()
    record = record_of(asked)
    first = {file.name: file.read_text() for file in draw(record, asked, tmp_path)}
    assert sorted(first) == sorted(f"{name}.svg" for name in asked)
    for name, question in asked.items():
        assert all(first[f"{name}.svg"].count(line) >= 2 for line in question.lines), "once in each panel"
        assert question.title in first[f"{name}.svg"]
    assert {file.name: file.read_text() for file in draw(record, asked, tmp_path)} == first
    only = {key: value for key, value in record["points"].items() if key == Work(rows=4).key}
    assert [file.stem for file in draw({**record, "points": only}, asked, tmp_path / "one")] == ["rows"]


def test_a_record_is_continued_on_the_same_machine(monkeypatch, tmp_path, data, capsys):
    asked = questions()
    record = record_of({name: asked[name] for name in ("rows",)})
    growth.write(record, tmp_path, asked)

    def begin(output, *, tiny):
        return json.loads((output / "cpu.json").read_text())

    def measure(points, args, kept):
        for i, point in enumerate(points):
            yield point, figures(point, i)

    monkeypatch.setattr(growth, "begin", begin)
    monkeypatch.setattr(growth, "measure", measure)
    growth.main(["--questions", "rows", "length", "--data", str(data), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3, "a row of 128 tokens is among the points of both"
    kept = json.loads((tmp_path / "cpu.json").read_text())["points"]
    assert kept.items() >= record["points"].items()
    assert len(kept) == len(record["points"]) + 3
    assert "How does a step grow with the length of rows?" in (tmp_path / "cpu.md").read_text()


def test_another_machine_does_not_continue_it(monkeypatch, tmp_path):
    growth.write(record_of(questions()), tmp_path, questions())
    tiny_runs.package_model()
    monkeypatch.setattr(growth, "describe", lambda: {**MACHINE, "cores": 8})
    with pytest.raises(SystemExit, match="another machine"):
        growth.begin(tmp_path, tiny=False)


def test_what_the_command_refuses(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        growth.parse(["--tiny"])
    assert "--tiny needs another --output" in capsys.readouterr().err
    monkeypatch.setattr(growth, "begin", lambda output, *, tiny: record_of({}))
    with pytest.raises(SystemExit, match=r"there is no .*wikitext-2/train.txt; give the folder"):
        growth.main(["--questions", "text", "--data", str(tmp_path), "--output", str(tmp_path)])


@pytest.mark.slow
def test_tiny_points_end_to_end(monkeypatch, tmp_path, data):
    """Steps with one and two adapted layers, and the starts of a run on two texts, the second of which reads the cache."""
    tiny_runs.package_model()
    monkeypatch.setenv("XLA_FLAGS", COMPILE_FAST)  # one device
    flags = ["--tiny", "--rounds", "1", "--data", str(data), "--output", str(tmp_path / "out")]
    growth.main(["--questions", "adapted", "text", *flags])
    points = json.loads((tmp_path / "out" / "cpu.json").read_text())["points"]
    asked = questions(tiny=True)
    steps = [points[point.key] for point in asked["adapted"].points]
    assert all(each["seconds"] > 0 and each["peak_bytes"] > 1e8 for each in steps)
    assert [each["trained"] for each in steps] == [2 * 2 * 32 * 2, 2 * 2 * 2 * 32 * 2, 2 * 2 * 32 * 2]
    starts = [points[point.key] for point in asked["text"].points]
    assert all(each["seconds"] > 0 and each["peak_bytes"] > each["anonymous_bytes"] > 1e8 for each in starts)
    assert starts[1]["token_bytes"] > starts[0]["token_bytes"] > 0
    assert starts[2]["token_bytes"] == starts[0]["token_bytes"], "the second start writes nothing"
    assert (tmp_path / "out" / "pictures" / "text.svg").is_file()
