"""Several processes, one a host, that run the same program: how they start, agree and share what only the first one does.

Every process computes the same values from the same seed and files, so that nothing is sent but gradients and what is here.
What reads or writes the run's directory is done by process 0, and its answer, or its error, is everyone's.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpeft.errors import InputError

T = TypeVar("T")

_MESSAGE_BYTES = 2048


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Call `jax.distributed.initialize`, once; what is None it detects (Cloud TPU, Slurm, Open MPI).

    Raises:
        InputError: where it cannot be done: nothing is detected, no answer from the others, or jax is in use already.
    """
    if jax.distributed.is_initialized():
        return
    # jax's own service would swallow SIGTERM from here on; `any_process` does its work for every signal.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:  # it knows too little
        raise InputError(
            f"--distributed: {error} Where jax detects no cluster, give cluster.coordinator_address (host:port of process 0), "
            "cluster.num_processes and cluster.process_id"
        ) from error
    except RuntimeError as error:  # it is too late, or nobody answers
        raise InputError(f"--distributed: {error}") from error


def check_started() -> None:
    """Raise InputError in one of several processes that were not told of each other: checkpoints could not be written."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"this host is one of {jax.process_count()}: give --distributed, and run the same command on all of them"
        )


def is_process_0() -> bool:
    """Whether this process is the one that writes and speaks."""
    return jax.process_index() == 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """Make an error of one process an error in all, at the end of a block in which none of them waits for another.

    Raises:
        InputError: in the processes without an error, naming those that have one.
    """
    try:
        yield
    except Exception as error:
        _gather(str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}")
        raise
    for i, message in enumerate(_gather("")):
        if message:
            raise InputError(f"process {i}: {message}")


def on_process_0(action: Callable[[], T]) -> T | None:
    """Do `action` in process 0 while the others wait, and return there what it returns; an error there is an error in all."""
    with all_or_none():
        return action() if is_process_0() else None


def check_shared(path: Path, *, seconds: float = 60.0) -> None:
    """Raise InputError in all processes where one of them does not see the file `path` that process 0 has written.

    A network's file system may take `seconds` to show it.
    """
    with all_or_none():
        limit = time.monotonic() + seconds
        while not path.is_file():
            if time.monotonic() > limit:
                raise InputError(
                    f"'{path}' is not there on process {jax.process_index()}; give an output_dir that all hosts share"
                )
            time.sleep(0.1)


def check_equal(values: Mapping[str, Callable[[], str]]) -> None:
    """Raise InputError where processes have different values of the same name: what they would train is not one model.

    The values are asked for only where there are several processes.
    """
    for name, value in values.items() if jax.process_count() > 1 else ():
        theirs = _gather(hashlib.sha256(value().encode()).hexdigest())
        if other := next((i for i, value in enumerate(theirs) if value != theirs[0]), None):
            raise InputError(f"process {other} has another {name} than process 0; give all hosts the same")


def any_process(requested: Callable[[], int | None], largest: Callable[[int], jax.Array]) -> Callable[[], int | None]:
    """`requested`, but with one answer for all processes, who ask it equally often: that of any of them, two asks later.

    Hosts get their signals at different moments, and a collective that one of them does not join never ends. The answer is reduced
    on the devices, behind the updates that are queued there, and read when those are done: no update waits for it.
    A single process's `requested` is returned as it is.

    Args:
        requested: a signal's number, or None.
        largest: the largest of all processes' values, on the devices (`DataParallel.largest`).
    """
    if jax.process_count() == 1:
        return requested
    asked: deque[jax.Array] = deque()

    def ask() -> int | None:
        asked.append(largest(requested() or 0))
        return int(asked.popleft()) or None if len(asked) > 2 else None

    return ask


def _gather(text: str) -> list[str]:
    """Every process's `text`, by process; cut to what one message holds."""
    if jax.process_count() == 1:
        return [text]
    raw = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    raw[: len(data)] = data
    rows = multihost_utils.process_allgather(raw)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
