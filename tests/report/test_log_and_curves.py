"""What a run writes as it goes, and the picture made from it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jaxpeft.report import console
from jaxpeft.report.curves import plot_curves
from jaxpeft.report.metrics_log import MetricsLog, read_metrics


def write(directory, steps, resumed_at=0):
    with MetricsLog(directory / "metrics.jsonl", directory / "tensorboard", resumed_at) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1.0 / step, "sparsity": 0.5})


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 4], resumed_at=2)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_new_log_starts_empty(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    write(tmp_path, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


@pytest.mark.parametrize(("sparsity", "taller"), [(0.0, False), (0.5, True)])
def test_curves_show_sparsity_only_where_it_changes(tmp_path, sparsity, taller):
    rows = [{"step": s, "split": "train", "loss": 3.0 - s, "sparsity": sparsity} for s in (1, 2)]
    rows += [{"step": 2, "split": "validation", "loss": 1.5}]
    path = plot_curves(rows, tmp_path / "curves.png", "a run")
    height = int.from_bytes(path.read_bytes()[20:24], "big")
    assert (height > 700) == taller


def test_the_bar_shows_loss_speed_and_time_left(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, force_terminal=True, width=120))
    with console.TrainingBar(0, 10) as bar:
        bar.advance(5)
        bar.show(5, loss=2.5, tokens_per_second=1234.0, seconds_left=60.0)
    assert "loss 2.500" in screen.getvalue()
    assert "1,234 tokens/s" in screen.getvalue()


def test_without_a_terminal_each_log_interval_is_a_line(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "console", Console(file=screen, width=120, soft_wrap=True))
    with console.TrainingBar(0, 10) as bar:
        bar.show(5, loss=2.5, tokens_per_second=1234.0, seconds_left=61.0)
    assert screen.getvalue() == "step     5/10  loss 2.500  1,234 tokens/s  1:01 left\n"
