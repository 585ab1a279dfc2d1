"""`python -m jaxpeft preflight`: its errors, and one small run compiled for a TPU, where libtpu can be found."""

import dataclasses
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
import tiny_runs

from jaxpeft import cli
from jaxpeft.config.parsing import parse_run
from jaxpeft.preflight import child, command
from jaxpeft.preflight.chips import parse_topology
from jaxpeft.preflight.collectives import Traffic
from jaxpeft.preflight.compiled import Compiled, Costs, Memory, Shortage
from jaxpeft.preflight.largest_batch import Attempt, Largest
from jaxpeft.preflight.report import Program, Report, lines, read_report
from jaxpeft.preflight.roofline import Roofline

RUN = "--model.name base --data.train_file train.txt --data.max_length 16 --adapter.rank 2 --evaluation.batch_size 8"


def preflight(root, flags, capsys):
    """(exit status, standard output, standard error) of the command in `root`."""
    with pytest.raises(SystemExit) as ended:
        tiny_runs.jaxpeft(root, "preflight", *RUN.split(), *flags.split())
    return ended.value.code, *capsys.readouterr()


@pytest.fixture
def root(tmp_path_factory):
    return tiny_runs.workplace(tmp_path_factory)


def has_libtpu():
    return bool(os.environ.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None


def needs_libtpu(test):
    skip = pytest.mark.skipif(
        not has_libtpu(),
        reason="needs libtpu: pip install -e '.[tpu-preflight]' elsewhere, and its libtpu.so in TPU_LIBRARY_PATH",
    )
    return pytest.mark.slow(pytest.mark.tpu_compiler(skip(test)))


def test_without_libtpu_one_line_says_how_to_get_it(root, capsys, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    status, _, said = preflight(root, "--topology v5e:2x2", capsys)
    assert status == 2
    assert "pip install -e '.[tpu-preflight]'" in said
    assert said.count("\n") == 1
    monkeypatch.setenv("TPU_LIBRARY_PATH", "nowhere/libtpu.so")
    status, _, said = preflight(root, "--topology v5e:2x2", capsys)
    assert (status, said.count("\n")) == (2, 1)
    assert "nowhere/libtpu.so" in said


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--topology v5e:3x3", "unknown shape; v5e comes in 1x1, 2x2"),
        ("--topology v7", "v5e, v5p, v6e"),
        ("--adapter.rank 0 --topology v5e:2x2", "adapter.rank is 0"),
        ("", "topology"),
    ],
)
def test_bad_input_is_one_line(flags, line, root, capsys):
    status, _, said = preflight(root, flags, capsys)
    assert (status, said.count("\n")) == (2, 1)
    assert line in said


def test_help_says_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        cli.main(["preflight", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "0 if everything fits, 1 if not, 2 for bad input" in said
    assert "--training.batch_size" in said


SHORT = Program("training", 64, 64, 128, Compiled(1.0, Shortage(40 * 2**30, int(15.75 * 2**30))))
COSTS = Costs(
    Memory(2**30, 0, 2**30, 2**29), 197e9, 819e6, Traffic(100, 8, 162.0, {"all-reduce": 2}), Roofline(1e-3, 2e-3, 1e-9)
)
FITS = Program("evaluation", 64, 64, 128, Compiled(1.0, COSTS))
PACKED = Program("training", 64, 16, 96, Compiled(1.0, COSTS))
IN_PASSES = Program("training", 64, 64, 128, Compiled(1.0, COSTS), passes=4)
LARGEST = Largest(8, 16, (Attempt(8, True, 1.0), Attempt(16, False, None)))


def test_what_is_said():
    report = Report("v5e:2x2", "0.10.2", "0.0.42", 100, (SHORT, PACKED, IN_PASSES, FITS), (16, 32), False, LARGEST)
    said = "\n".join(lines(report))
    assert "64 rows of 128 tokens, 16 a chip: does not fit" in said
    assert "training step, 64 texts in 16 rows of 96 tokens, 4 a chip: fits" in said
    assert "training step, 64 rows of 128 tokens, 16 a chip in 4 passes: fits" in said
    assert "not counted: the training rows" in said
    assert "at least 40.00 of 15.75 GiB" in said
    assert "2.50 of 15.75 GiB: arguments 1.00" in said
    assert "2.000 ms, limited by HBM bandwidth" in said
    assert "32 texts (8 a chip) fit; 64 do not (2 compilations)" in said
    assert "buckets of 16, 32 tokens" in said
    assert read_report(json.loads(json.dumps(dataclasses.asdict(report)))) == report


@pytest.mark.parametrize(
    ("given", "rows_that_fit", "passes", "tried"),
    [
        (24, 64, 3, [24]),  # 16 rows a chip in passes of 6: three
        ("auto", 64, 1, [64]),
        ("auto", 16, 4, [64, 32, 16]),
        ("auto", 0, 16, [64, 32, 16, 8, 4]),  # not even one row a chip
        (32, 16, 2, [32]),  # as asked for, whether it fits or not
    ],
)
def test_a_batch_is_compiled_in_as_few_passes_as_fit(given, rows_that_fit, passes, tried, monkeypatch):
    compiled = []

    def compile_rows(topology, micro_batches, **options):
        compiled.append(micro_batches.rows)
        return Compiled(1.0, COSTS if micro_batches.rows <= rows_that_fit else SHORT.compiled.outcome)

    monkeypatch.setattr(child, "lower_training", lambda run, size, length, micro_batches: micro_batches)
    monkeypatch.setattr(child, "compile_for", compile_rows)
    monkeypatch.setattr(child, "_fixed_bytes", lambda run: 0)
    run = SimpleNamespace(micro_batch_size=given, training_shape=lambda size, length: (size, length))
    found, program = child._training(run, parse_topology("v5e:2x2"), 64, 128)
    assert (found, compiled) == (passes, tried)
    assert isinstance(program.outcome, Costs) == (min(tried) <= rows_that_fit)


@pytest.mark.parametrize(("program", "status"), [(FITS, 0), (SHORT, 1)])
def test_the_exit_status_says_whether_it_fits(program, status, root, capsys, monkeypatch):
    report = Report("v5e:2x2", "0.10.2", "0.0.42", 100, (program,), (), True, None)
    monkeypatch.setattr(command, "compile_in_child", lambda *args, **options: report)
    assert preflight(root, "--topology v5e:2x2", capsys)[0] == status


@needs_libtpu
def test_a_run_compiled_for_four_chips(root, capsys):
    """Fits, costs, and sends between chips no more than the adapters' gradients and a few scalars."""
    with tiny_runs.contextlib.chdir(root):
        config = parse_run([*RUN.split(), "--training.batch_size", "8"], "preflight")()
        report = command.compile_in_child(config, "v5e:2x2", largest_batch=False)
    training, evaluation = (program.compiled.outcome for program in report.programs)
    assert report.fits
    assert 0 < training.traffic.array_bytes <= report.gradient_bytes
    assert 0 < training.traffic.scalar_bytes <= 16
    assert training.traffic.opcodes.keys() == {"all-reduce"}
    assert evaluation.traffic.array_bytes == 0
    assert training.flops > evaluation.flops > 0
    assert 0 < training.memory.total_bytes < 15.75 * 2**30


@needs_libtpu
def test_packed_texts_compiled_for_four_chips(root):
    """The rows that hold them, the training texts among the arguments, and one search that ends where there are no more texts."""
    flags = (
        "--task classification --model.name base --data.train_file labels.tsv --data.packing true --data.max_length 32 "
        "--adapter.rank 2 --training.batch_size 32 --evaluation.batch_size 8"
    )
    with tiny_runs.contextlib.chdir(root):
        config = parse_run(flags.split(), "preflight")()
        report = command.compile_in_child(config, "v5e:2x2", largest_batch=True, every_bucket=True, kinds=("training",))
    (training,) = report.programs
    assert training.num_rows < training.batch_size == 32
    assert report.counts_data
    assert report.largest_batch.rows == 36 // 4  # of forty texts four are held out
    assert 0 < training.compiled.outcome.traffic.array_bytes <= report.gradient_bytes
    assert training.compiled.outcome.traffic.opcodes.keys() == {"all-reduce"}


@needs_libtpu
def test_a_batch_that_cannot_be_split(root, capsys):
    status, _, said = preflight(root, "--topology v5e:2x2 --training.batch_size 6", capsys)
    assert (status, said.count("\n")) == (2, 1)
    assert "training.batch_size 6 cannot be split over 4 devices; 4 can" in said
