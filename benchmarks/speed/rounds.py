"""The parent process: starts a worker for each side and lets them work in rounds, one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Case

ROOT = Path(__file__).parents[2]

PRODUCTS = {
    "cpu": [(2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)],
    "gpu": [(32768, 768, 3072), (32768, 3072, 768), (8192, 8192, 8192)],
}
"""Sizes of matrix products whose best rate counts as the peak: BERT-base's own, and a large square one."""

# jaxpeft's loop needs one round to compile and one to learn how many micro-steps it may dispatch at once.
WARM_ROUNDS = {"ours": 3, "theirs": 2}


@dataclass(frozen=True)
class Paths:
    """Directories put first on each side's import path, if the sides need different packages. None means this Python's own packages.

    `cache` is a directory for the programs that jax compiles. Without one nothing comes from a cache, so that compile times are those
    of a first run.
    """

    ours: str | None = None
    theirs: str | None = None
    cache: str | None = None

    def environment(self, side: str) -> dict[str, str]:
        """The environment of a side's process."""
        extra = getattr(self, side)
        path = os.pathsep.join(filter(None, [extra, str(ROOT), os.environ.get("PYTHONPATH")]))
        forced = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        if self.cache:
            forced = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": self.cache}
        # transformers must not import torch on the jaxpeft side, as in `python train.py`.
        forced |= {"USE_TORCH": "0", "USE_TF": "0"} if side == "ours" else {}
        # On a GPU two jaxpeft processes run side by side (LoRA and another method), and each reserves this share of its memory at once.
        shared = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"} if side == "ours" else {}
        return {**shared, **os.environ, **forced, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """A process that serves one side (`benchmarks.speed.worker`)."""

    def __init__(self, side: str, paths: Paths) -> None:
        self.side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.speed.worker", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=paths.environment(side),
            cwd=ROOT,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. A failure in the worker raises a RuntimeError here."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended with status {self._process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"the worker of {self.side} failed at '{do}':\n{answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def workers(sides: list[str], paths: Paths) -> Iterator[list[Worker]]:
    """A worker for each of `sides`, ended afterwards."""
    with ExitStack() as stack:
        started = []
        for side in sides:
            started.append(Worker(side, paths))
            stack.callback(started[-1].close)
        yield started


@dataclass(frozen=True)
class Runner:
    """One column of a comparison: jaxpeft, or a variant of PEFT."""

    method: str
    variant: str = ""  # "" is jaxpeft

    @property
    def side(self) -> str:
        """Which worker serves it."""
        return "theirs" if self.variant else "ours"

    @property
    def column(self) -> str:
        """Its name in the record."""
        return self.variant or "ours"


class RunnerError(RuntimeError):
    """`runner` cannot be compared."""

    def __init__(self, runner: Runner, message: str) -> None:
        super().__init__(message)
        self.runner = runner


@dataclass
class Timing:
    """A runner's answers: of the start, the warm-up rounds, the timed rounds, memory and FLOPs."""

    start: dict[str, Any]
    warm: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    flops: float | None = None


def measure_peaks(
    dtypes: set[str],
    device: str,
    paths: Paths,
    *,
    rounds: int = 3,
    sizes: list[tuple[int, int, int]] | None = None,
    sides: Sequence[str] = ("ours", "theirs"),
) -> dict[str, Any]:
    """The rates of matrix products of `sides` by dtype, the best of `rounds` in turns; `sizes` are `PRODUCTS` by default."""
    repeats = 1 if device == "cpu" else 20
    peaks: dict[str, Any] = {}
    with workers(list(sides), paths) as started:
        for dtype in sorted(dtypes):
            peaks[dtype] = {worker.side: [] for worker in started}
            for size in sizes or PRODUCTS[device]:
                rates: dict[str, list[float]] = {worker.side: [] for worker in started}
                for _ in range(rounds + 1):  # the first round warms up
                    for worker in started:
                        answer = worker.ask("rate", size=size, dtype=dtype, repeats=repeats)
                        rates[worker.side].append(answer["flops_per_second"])
                for side, values in rates.items():
                    peaks[dtype][side].append({"size": list(size), "rate": float(f"{max(values[1:]):.4g}")})
    return peaks


def write_workload(case: Case, data: Path, directory: Path, paths: Paths) -> None:
    """Write a case's model and batches, in a process of its own with the jaxpeft side's packages."""
    command = [sys.executable, "-m", "benchmarks.speed.workload", json.dumps(asdict(case)), str(data), str(directory)]
    subprocess.run(command, env=paths.environment("ours"), cwd=ROOT, check=True)


def compare(
    case: Case, runners: list[Runner], *, rounds: int, workload: Path, paths: Paths, count: bool = True
) -> Mapping[Runner, Timing]:
    """Time all `runners` on the case: `WARM_ROUNDS` to warm up, then `rounds` rounds. Their order is reversed in every other round.

    `count` also has the frameworks count a step's operations, for which jaxpeft's step is compiled once more.

    Raises:
        RunnerError: a runner does not start, or its work is not that of jaxpeft's side.
        RuntimeError: a worker fails later.
    """
    with workers([runner.side for runner in runners], paths) as started:
        served = dict(zip(runners, started, strict=True))
        timings = {}
        for runner, worker in served.items():
            try:
                start = worker.ask(
                    "start", case=asdict(case), method=runner.method, workload=str(workload), variant=runner.variant
                )
                timings[runner] = Timing(start)
                timings[runner].warm = [worker.ask("round") for _ in range(WARM_ROUNDS[runner.side])]
            except RuntimeError as error:
                raise RunnerError(runner, str(error)) from None
            timings[runner].memory = {"life": worker.ask("memory", reset=True)["process"]}
        _require_same_work(case, timings)
        for i in range(rounds):
            for runner in runners if i % 2 == 0 else reversed(runners):
                timings[runner].rounds.append(served[runner].ask("round"))
        for runner, worker in served.items():
            timings[runner].memory |= worker.ask("memory")
            timings[runner].flops = worker.ask("count")["flops"] if count else None
        return timings


def _require_same_work(case: Case, timings: Mapping[Runner, Timing]) -> None:
    """Compare first losses and parameter counts. A new adapter is a no-op, so equal values mean the same model, batch and layers."""
    tolerance = 1e-3 if case.dtype == "float32" else 2e-2
    for runner, timing in timings.items():
        ours = timings.get(Runner(runner.method))
        if ours is None or not runner.variant:
            continue
        a, b = ours.start, timing.start
        exact = runner.method != "qlora"  # each side rounds the base in its own way
        if a["trainable"] != b["trainable"] or abs(a["first_loss"] - b["first_loss"]) > (tolerance if exact else 0.1):
            raise RunnerError(
                runner, f"{case.name}, {runner.method}: ours starts from {a}, PEFT ({runner.variant}) from {b}"
            )
