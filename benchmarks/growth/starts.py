"""Time to the first step and resident memory of a run, over the size of its data. Each start is `python train.py` in a process of its own.

The compilation cache has all programs but those in which the size of the data stands, and validation has one batch, so that the difference
between two sizes is the data's. The memory is read after the initial validation and some more steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.growth.questions import Start
from benchmarks.growth.texts import write_file
from benchmarks.speed.cases import TOKENIZER
from benchmarks.speed.machine import measured_now
from benchmarks.speed.startup import started
from jaxpeft.config import AdapterConfig, DataConfig, EvaluationConfig, ModelConfig, RunConfig, TrainingConfig
from jaxpeft.config.files import write_config

VALIDATION = {"masked-lm": "wikitext-2/valid.txt", "classification": "sst2/dev.tsv"}
"""Task → the validation file in `--data`, the same for all sizes."""
_STEPS = 6
"""Steps after which the memory is read."""
_WARM_SIZE = {"masked-lm": 20_000, "classification": 100}
"""Sizes of the data of the start that fills the compilation cache."""


def measure_starts(
    starts: Iterable[Start], data: Path, *, kept: Path, tiny: bool
) -> Iterator[tuple[Start, dict[str, Any]]]:
    """Each of `starts` with its figures, as they are measured. `kept` is a directory for files that all of them need.

    A second start needs the tokens of the first, so the first start of a size is made again if only the second is asked for.
    """
    for (task, size), group in groupby(sorted(starts, key=_order), key=lambda start: (start.task, start.size)):
        asked = list(group)
        if not (kept / f"{task}-is-warm").is_dir():
            with tempfile.TemporaryDirectory() as directory:
                small = write_file(task, data, _WARM_SIZE[task], Path(directory))
                _measure(task, small, data, kept / "programs", Path(directory), tiny=tiny)
            (kept / f"{task}-is-warm").mkdir()
        with tempfile.TemporaryDirectory() as directory:
            file = write_file(task, data, size, Path(directory))
            for again in (False, True):
                figures = _measure(task, file, data, kept / "programs", Path(directory), tiny=tiny, name=f"run-{again}")
                if Start(task, size, again) in asked:
                    yield Start(task, size, again), figures


def _order(start: Start) -> tuple[str, int, bool]:
    return start.task, start.size, start.again


def run_config(task: str, train_file: Path, data: Path, *, tiny: bool) -> RunConfig:
    """The run that is started: MiniLM with LoRA, 16 rows a batch, in a single shape."""
    labelled = task == "classification"
    length = 64 if labelled else 128
    return RunConfig(
        task=task,
        model=ModelConfig(name=TOKENIZER),
        data=DataConfig(
            train_file=str(train_file),
            validation_file=str((data / VALIDATION[task]).absolute()),
            column_names=["sentence", "label"] if labelled else None,
            max_length=16 if tiny else length,
            bucket_lengths=[16 if tiny else length],
        ),
        adapter=AdapterConfig(rank=8, alpha=16, target_modules=["query", "value"]),
        training=TrainingConfig(num_steps=1000, batch_size=2 if tiny else 16, eval_every_steps=500),
        evaluation=EvaluationConfig(batch_size=2 if tiny else 16, max_batches=1, before=False),
    )


def _measure(
    task: str, file: Path, data: Path, programs: Path, directory: Path, *, tiny: bool, name: str = "run"
) -> dict[str, Any]:
    config, tokens = directory / "config.yaml", directory / "tokens"
    write_config(run_config(task, file, data, tiny=tiny).resolved(), config)
    flags = ("--config", str(config), "--data.token_cache", str(tokens))
    with started(directory / name, programs, *flags) as run:
        seconds = run.seconds_to_step(1)
        run.seconds_to_step(_STEPS)
        memory = memory_of(run.pid)
    return {
        "seconds": round(seconds, 2),
        **memory,
        "data_bytes": file.stat().st_size,
        "token_bytes": sum(each.stat().st_size for each in tokens.rglob("*") if each.is_file()),
        "measured": measured_now(),
    }


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of a process: its peak of resident memory, and what is resident now that is not a page of a file."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    named = {"peak_bytes": "VmHWM", "anonymous_bytes": "RssAnon"}
    return {name: int(status[field].split()[0]) * 1024 for name, field in named.items()}
