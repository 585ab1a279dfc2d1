"""Several processes: two real ones on this machine, as two hosts would be, against one with as many devices."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import chdir

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from compiling import COMPILE_FAST
from safetensors.numpy import load_file

from jaxpeft.cli import train as train_command
from jaxpeft.config import ClusterConfig, RunConfig
from jaxpeft.config.parsing import parse_run
from jaxpeft.data import Split, Splits
from jaxpeft.errors import InputError
from jaxpeft.training import multihost

CLASSES = """
--task classification --model.name base --data.train_file labels.tsv --data.bucket_lengths [8,16] --training.num_steps 4
"""
MASKED = """
--model.name base --data.train_file train.txt --data.validation_file validation.txt --data.test_file test.txt
--adapter.dropout 0.1 --training.num_steps 40 --training.eval_every_steps 20
"""
pytestmark = pytest.mark.xdist_group("multihost")  # which goes early: it would be a long end
SECONDS = 120  # and not a pod's five minutes: a process that waits for the other for ever fails the test


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


class Hosts:
    """`python -m jaxpeft train FLAGS --distributed` in `root`, in two processes of two devices each."""

    def __init__(self, root, flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            cluster = f"--cluster.coordinator_address 127.0.0.1:{free.getsockname()[1]} --cluster.num_processes 2"
        command = [sys.executable, "-m", "jaxpeft", "train", *flags, "--distributed", *cluster.split()]
        environment = {
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {COMPILE_FAST}",
        }
        options = {"cwd": root, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.running = [subprocess.Popen([*command, "--cluster.process_id", str(i)], **options) for i in range(2)]

    def wait(self):
        """[(exit status, standard output, standard error)]"""
        limit = time.monotonic() + SECONDS
        try:
            done = [process.communicate(timeout=limit - time.monotonic()) for process in self.running]
            return [(process.returncode, *texts) for process, texts in zip(self.running, done, strict=True)]
        finally:
            for process in self.running:
                process.kill()

    def stop_one(self, metrics, step):
        """SIGTERM to the second process alone, once update `step` is in the file `metrics`."""
        limit = time.monotonic() + SECONDS
        while time.monotonic() < limit and all(process.poll() is None for process in self.running):
            if metrics.is_file() and f'"step": {step},' in metrics.read_text():
                break
            time.sleep(0.01)
        self.running[1].send_signal(signal.SIGTERM)


def flags_of(name, flags):
    return [*tiny_runs.COMMON.split(), "--name", name, *flags.split()]


def losses(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert len({(row["step"], row["split"]) for row in rows}) == len(rows), "a row was written twice"
    return {(row["step"], row["split"]): row["loss"] for row in rows}


def assert_same_run(one, other):
    """The losses, the exported weights, the test figures, and the names of the files."""
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    expected, found = (load_file(directory / "adapter/adapter_model.safetensors") for directory in (one, other))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5, rtol=1e-5, err_msg=name)
    tests = [json.loads((directory / "results.json").read_text())["test"] for directory in (one, other)]
    assert tests[1] == pytest.approx(tests[0], rel=1e-5, abs=1e-5)
    assert files(one) == files(other)


def files(directory):
    """Names, but for what is inside a checkpoint."""
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    return {str(path) for path in paths if path.parts[0] not in ("checkpoints", "tensorboard")}


@pytest.mark.slow
def test_two_processes_train_what_one_does(root):
    alone, results = tiny_runs.train(root, f"--name one-host {CLASSES}")
    hosts = Hosts(root, flags_of("two-hosts", CLASSES)).wait()
    assert [status for status, *_ in hosts] == [0, 0], hosts
    together = root / "runs/two-hosts"
    assert_same_run(alone, together)
    assert len(list((together / "tensorboard").iterdir())) == 1
    assert "device 4 x cpu on 2 hosts" in hosts[0][1]
    assert hosts[1][1].strip() == "" or "jaxpeft" not in hosts[1][1], "two hosts spoke"
    assert json.loads((together / "results.json").read_text())["device"].startswith("4 x cpu on 2 hosts")
    assert results["device"].startswith("4 x cpu (")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_any_number_resumes(root):
    alone, _ = tiny_runs.train(root, f"--name one-host-masked {MASKED}")
    hosts = Hosts(root, flags_of("two-hosts-masked", MASKED))
    run = root / "runs/two-hosts-masked"
    hosts.stop_one(run / "metrics.jsonl", 3)
    done = hosts.wait()
    assert [status for status, *_ in done] == [128 + signal.SIGTERM] * 2, done
    stopped = max(step for step, _ in losses(run))
    assert 3 < stopped < 40
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(stopped)]
    assert f"step {stopped} is saved" in done[0][1]
    assert "--resume --distributed" in done[0][1]
    assert "distributed" not in (run / "config.yaml").read_text()

    shutil.copytree(run, root / "copy/two-hosts-masked")
    done = Hosts(root, ["--config", str(run / "config.yaml"), "--resume"]).wait()
    assert [status for status, *_ in done] == [0, 0], done
    assert f"resumed after step {stopped}" in done[0][1]
    assert_same_run(alone, run)

    with chdir(root):
        resume = ["--config", "copy/two-hosts-masked/config.yaml", "--output_dir", "copy", "--resume"]
        (root / "copy/two-hosts-masked/config.yaml").write_text(
            (run / "config.yaml").read_text().replace("output_dir: runs", "output_dir: copy")
        )
        train_command.main(resume, prog="train.py")
    assert_same_run(alone, root / "copy/two-hosts-masked")


def test_an_error_in_one_process_stops_all(root):
    (root / "runs/two-hosts-taken").mkdir(parents=True)
    (root / "runs/two-hosts-taken/file").touch()
    done = Hosts(root, flags_of("two-hosts-taken", CLASSES)).wait()
    assert [status for status, *_ in done] == [2, 2], done
    for _, _, errors in done:
        assert "'runs/two-hosts-taken' already holds a run" in errors
        assert "Traceback" not in errors


@pytest.fixture
def second_of_three(monkeypatch):
    """This process as the second of three, of which the others say what `said` gives: a list, or a function of what this one says."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost, "_gather", lambda text: [said[0], text, said[1]] if said else [text] * 3)
    return said


def test_a_stop_is_agreed_on_two_asks_later(second_of_three):
    received, everywhere = [], []

    def largest(value):
        everywhere.append(value)
        return jnp.asarray(max(value, 15 if len(everywhere) == 3 else 0))  # another process has it at the third ask

    ask = multihost.any_process(lambda: received[0] if received else None, largest)
    assert [ask() for _ in range(5)] == [None, None, None, None, 15]
    received.append(2)
    assert ask() is None
    assert everywhere == [0, 0, 0, 0, 0, 2]


def test_a_single_process_asks_nobody():
    def requested():
        return None

    assert multihost.any_process(requested, lambda value: pytest.fail("asked the devices")) is requested
    multihost.check_equal({"data": lambda: pytest.fail("made a digest")})
    multihost.check_started()
    assert multihost.is_process_0()
    assert multihost.on_process_0(lambda: "done") == "done"


def test_an_error_of_one_is_everyones(second_of_three, tmp_path):
    with multihost.all_or_none():
        pass
    with pytest.raises(ZeroDivisionError), multihost.all_or_none():
        _ = 1 // 0
    second_of_three[:] = ["", "'labels.tsv' does not exist"]
    with pytest.raises(InputError, match=r"^process 2: 'labels.tsv' does not exist$"), multihost.all_or_none():
        pass
    second_of_three[:] = ["'runs/x' already holds a run", ""]
    with pytest.raises(InputError, match="process 0: 'runs/x' already holds a run"):
        multihost.on_process_0(lambda: pytest.fail("this is not the first"))


def test_what_must_be_equal(second_of_three):
    multihost.check_equal({"data": lambda: "a", "base": lambda: "b"})
    second_of_three[:] = ["another", "another"]
    with pytest.raises(InputError, match="process 1 differs from process 0 in its data"):
        multihost.check_equal({"data": lambda: "a"})


def test_a_directory_that_is_not_shared(second_of_three, tmp_path):
    (tmp_path / "config.yaml").touch()
    multihost.check_shared(tmp_path / "config.yaml", seconds=0)
    with pytest.raises(InputError, match="give an output_dir that all hosts share"):
        multihost.check_shared(tmp_path / "other.yaml", seconds=0)


def test_a_host_that_was_not_told_of_the_others(second_of_three):
    with pytest.raises(InputError, match="one of 3: give --distributed"):
        multihost.check_started()


def test_jax_is_in_use_already():
    jax.devices()
    with pytest.raises(InputError, match=r"^--distributed: .*jax.distributed.initialize"):
        multihost.start(None, None, None)


def test_the_flags(tmp_path):
    args = "--data.name python-docs --distributed --cluster.coordinator_address a:1 --cluster.num_processes 2"
    config = parse_run([*args.split(), "--cluster.process_id", "1"], "train.py")()
    assert config.distributed
    assert config.cluster == ClusterConfig("a:1", 2, 1)
    assert config.resolved() == parse_run(["--data.name", "python-docs"], "train.py")().resolved()
    with pytest.raises(
        InputError, match=r"cluster.process_id is 2; it must be at least 0 and below cluster.num_processes"
    ):
        parse_run([*args.split(), "--cluster.process_id", "2"], "train.py")()
    with pytest.raises(InputError, match=r"cluster.num_processes 2 needs --distributed"):
        RunConfig(data=config.data, cluster=ClusterConfig(num_processes=2))


def test_digests_of_data():
    split = Split(["a", "b"], None, np.array([0, 1], np.int32))
    digests = {
        Splits(*parts, 2, None, "here").digest()
        for parts in [
            (split, split, None),
            (split, split, split),
            (Split(["a", "b"], ["c", "d"], split.labels), split, None),
            (Split(["a", "b"], None, np.array([1, 1], np.int32)), split, None),
            (Split(["ab"], None, split.labels), split, None),
        ]
    }
    assert len(digests) == 5
    assert Splits(split, split, None, 2, None, "elsewhere").digest() in digests
