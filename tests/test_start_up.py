"""A run starts fast: programs of earlier runs are loaded instead of compiled, and nothing is imported before it is needed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny_runs
from jax.experimental.compilation_cache import compilation_cache

from jaxpeft import RunConfig
from jaxpeft.config import DataConfig
from jaxpeft.config.files import differences
from jaxpeft.errors import InputError
from jaxpeft.runs.compilation_cache import default_directory, enable_compilation_cache

ROOT = Path(__file__).resolve().parents[1]
RUN = "--model.name base --pruning.sparsity 0.5 --training.num_steps 2 --evaluation.max_batches 1"
FILES = ("--data.train_file", "train.txt", "--data.validation_file", "validation.txt")
CACHE = ("JAX_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
HEAVY = "accelerate bitsandbytes datasets matplotlib pandas peft scipy.stats sklearn tensorflow torch"
COUNTED = """
import collections, json, sys
import jax
from jaxpeft.cli import train as train_command
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.rpartition("/")[2]]))
train_command.main(prog="train.py")
print(json.dumps(counts))
"""
UP_TO_TRAINING = """
import json, sys
from jaxpeft.cli import train as train_command
from jaxpeft.runs import train
def fit(*_, **__):
    print(json.dumps(sorted(sys.modules)))
    sys.exit()
train.fit = fit
train_command.main(prog="train.py")
"""


def process(script, root, *flags, **environment):
    """What `script` prints last, run as a command of its own in `root` with a run's `flags`."""
    command = [sys.executable, "-c", script, *tiny_runs.COMMON.split(), *RUN.split(), *flags]
    environment = {**without_cache(os.environ), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a start that goes well says nothing on standard error"
    return json.loads(done.stdout.splitlines()[-1])


def without_cache(environment):
    """A user's, who was told nothing of the directory where the suite keeps its programs."""
    return {name: value for name, value in environment.items() if not name.startswith(CACHE)}


@pytest.mark.slow
def test_second_run_compiles_nothing(tmp_path_factory, tmp_path):
    root = tiny_runs.workplace(tmp_path_factory)
    where = {"XDG_CACHE_HOME": str(tmp_path)}
    first = process(COUNTED, root, *FILES, "--name", "cold", **where)
    second = process(COUNTED, root, *FILES, "--name", "warm", **where)
    kept = list((tmp_path / "jaxpeft" / "compiled").glob("*-cache"))
    assert len(kept) == first["cache_misses"] > 20, "small programs are kept too"
    assert "cache_misses" not in second
    assert second["cache_hits"] == second["compile_requests_use_cache"] >= first["cache_misses"]
    cold, warm = root / "runs" / "cold", root / "runs" / "warm"
    assert measured(cold) == measured(warm)
    weights = "adapter/adapter_model.safetensors"
    assert (cold / weights).read_bytes() == (warm / weights).read_bytes()


def measured(run):
    """The rows of `metrics.jsonl` without their speed."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def test_nothing_is_imported_before_it_is_needed(tmp_path_factory):
    root = tiny_runs.workplace(tmp_path_factory)
    programs = os.environ["JAX_COMPILATION_CACHE_DIR"]  # the suite's, which other tests have filled
    loaded = process(
        UP_TO_TRAINING, root, "--data.name", "python-docs", "--name", "lazy", JAX_COMPILATION_CACHE_DIR=programs
    )
    assert "transformers" in loaded
    assert not set(HEAVY.split()) & set(loaded)


@pytest.fixture
def jax_settings(monkeypatch, tmp_path):
    """jax as it is in a user's process: it may keep programs, and was not told where."""
    names = [
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith(CACHE)]:
        monkeypatch.delenv(name)
    for name, value in zip(names, (True, None, 1.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def kept_in():
    return jax.config.jax_compilation_cache_dir


@pytest.mark.usefixtures("jax_settings")
def test_where_programs_are_kept(tmp_path):
    enable_compilation_cache()
    assert kept_in() == str(tmp_path / "cache" / "jaxpeft" / "compiled") == str(default_directory())
    assert default_directory().stat().st_mode & 0o077 == 0, "who can write there can run code here"
    enable_compilation_cache(str(tmp_path / "here"))
    enable_compilation_cache()
    assert kept_in() == str(tmp_path / "here"), "what jax was told stays"
    enable_compilation_cache(None)
    assert kept_in() is None
    enable_compilation_cache(several_hosts=True)
    assert kept_in() is None, "the others would not see the first host's"


@pytest.mark.usefixtures("jax_settings")
def test_settings_of_jax_win(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    enable_compilation_cache(str(tmp_path))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1
    jax.config.update("jax_enable_compilation_cache", False)
    enable_compilation_cache(str(tmp_path / "never"))
    assert kept_in() == str(tmp_path)
    assert not (tmp_path / "never").exists()


@pytest.mark.usefixtures("jax_settings")
def test_a_directory_that_cannot_be_written_to(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"compilation_cache .*file/inside: Not a directory; give another"):
        enable_compilation_cache(str(tmp_path / "file" / "inside"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    enable_compilation_cache()
    assert kept_in() is None
    assert capsys.readouterr().out.count("compiled programs are not kept in") == 1


def test_another_machine_may_resume():
    run = RunConfig(data=DataConfig(name="python-docs"))
    assert not differences(run.resolved(), replace(run, compilation_cache="/elsewhere").resolved())
    assert "compilation_cache" not in run.resolved()
