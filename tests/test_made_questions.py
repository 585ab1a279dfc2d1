"""The questions that the configuration of question answering is tried with: its command makes them from texts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft.config.files import read_config
from jaxpeft.data import has_unanswerable
from jaxpeft.runs.data import load_data

ROOT = Path(__file__).parent.parent
FIRST = (
    "Anna Holm was born near the old harbour , where her parents owned a small shop . The shop was moved to Malmö in 1924 , and a "
    "second one was opened @-@ at the railway station @-@ by her brother . She wrote 1 @,@ 200 letters ."
)
SECOND = (
    "The bridge over the river was built by two engineers in 1871 ( a year of floods ) . It has been repaired several times since . "
    "Lake Ost is the deepest of the lakes in this part of the country , and it is said to be the coldest one ."
)


def made(tmp_path, **texts):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    command = [sys.executable, "-m", "benchmarks.made_questions", "--texts", str(folder), "--most", "50"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, check=True, env=environment, capture_output=True)
    return tmp_path / "made-questions"


def test_questions_by_hand(tmp_path):
    text = f" = Title = \n \n {FIRST} \n {SECOND} \n"
    made(tmp_path, train=text, valid=text, test=text)
    (article,) = json.loads((tmp_path / "made-questions/train.json").read_text())["data"]
    assert [
        (qa["question"], [answer["text"] for answer in qa["answers"]]) for p in article["paragraphs"] for qa in p["qas"]
    ] == [
        ("Who or what was born near the old harbour, where her parents owned?", ["Anna Holm"]),
        ("The shop was moved to Malmö in which year?", ["1924"]),
        ("The bridge over the river was built by two engineers in which year?", ["1871"]),
        ("Who or what is the deepest of the lakes in this part of?", ["Lake Ost"]),
        ("Who or what was born near the old harbour, where her parents owned?", []),
    ]
    first, second = (paragraph["context"] for paragraph in article["paragraphs"])
    assert "opened-at the railway station-by" in first
    assert first.endswith("She wrote 1,200 letters.")
    assert "1871 (a year of floods)." in second


def test_the_configuration_reads_them(tmp_path, monkeypatch):
    folder = Path(os.environ.get("JAXPEFT_TEST_DATA", ROOT / ".." / "shared" / "data")) / "wikitext-2"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set JAXPEFT_TEST_DATA")
    names = ("train", "valid", "test")
    made(tmp_path, **{name: "\n".join((folder / f"{name}.txt").read_text().splitlines()[:400]) for name in names})
    monkeypatch.chdir(tmp_path)
    config = read_config(ROOT / "configs" / "question-answering.yaml")
    task, splits = load_data(config.data, config.task)
    assert task.calibration == {"null_threshold": 0.0}
    assert len(splits.train) == 50
    assert has_unanswerable(splits)
