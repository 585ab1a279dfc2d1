"""The rules of a run's directory: what blocks a new run, and what does not."""

import errno
import subprocess
import sys

import pytest
import tiny_runs

from jaxpeft.config import DataConfig, RunConfig
from jaxpeft.errors import InputError
from jaxpeft.runs.directory import RunDirectory

CONFIG = RunConfig(name="x", data=DataConfig(name="python-docs"))


@pytest.fixture
def directory(tmp_path):
    """A run that has started and saved nothing."""
    made = RunDirectory(tmp_path / "x")
    made.create(CONFIG.resolved())
    made.metrics.write_text('{"step": 0, "split": "train"}\n')
    (made.tensorboard / "events").mkdir(parents=True)
    made.checkpoints.mkdir()
    return made


def test_a_run_without_a_checkpoint_blocks_nothing_and_is_removed(directory):
    (directory.path / "notes.txt").write_text("mine")
    directory.check(CONFIG.resolved(), resume=False)
    directory.create(CONFIG.resolved())
    assert {path.name for path in directory.path.iterdir()} == {"config.yaml", "notes.txt"}


@pytest.mark.parametrize("kept", ["checkpoints/20", "results.json"])
def test_a_run_with_something_to_keep_is_not_overwritten(kept, directory):
    (directory.path / kept).parent.mkdir(exist_ok=True)
    (directory.path / kept).write_text("{}")
    with pytest.raises(InputError, match=r"already holds a run; continue it with --config .*config\.yaml --resume"):
        directory.check(CONFIG.resolved(), resume=False)
    directory.create(CONFIG.resolved())
    assert (directory.path / kept).exists()
    assert directory.metrics.exists()


def test_other_files_block_a_run(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="already holds a run"):
        RunDirectory(tmp_path / "x").check(CONFIG.resolved(), resume=False)


def test_a_run_that_is_training_is_not_started_again(directory):
    code = "import sys; from pathlib import Path; from jaxpeft.runs.directory import RunDirectory\n"
    code += "with RunDirectory(Path(sys.argv[1])).in_use(): print('training', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "training\n"
        with pytest.raises(
            InputError, match=r"another process is training the run in .*; wait for its end, or give another --name"
        ):
            directory.check(CONFIG.resolved(), resume=False)
        other.communicate()
    directory.check(CONFIG.resolved(), resume=False)


def test_a_file_system_without_locks_blocks_nothing(directory, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with directory.in_use():
        directory.check(CONFIG.resolved(), resume=False)


@pytest.mark.xdist_group("runs")
def test_the_same_command_starts_again_after_a_failure(tmp_path_factory, capsys):
    root = tiny_runs.workplace(tmp_path_factory)
    flags = "--name failing --model.name base --data.train_file train.txt --adapter.method head --training.eval_every_steps 6"
    for _ in range(2):
        with pytest.raises(SystemExit):
            tiny_runs.train(root, flags, "--training.learning_rate", "1e30")
        assert "the loss is" in capsys.readouterr().err
    _, results = tiny_runs.train(root, flags)
    assert results["steps"] == 6
    assert "ended before its first checkpoint, so it starts anew" in capsys.readouterr().out
