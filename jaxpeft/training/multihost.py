"""Several processes, one per host, that run the same program: how they start, agree, and share the work of process 0.

Every process computes the same values from the same seed and files, so they send each other only gradients and the
messages of this module. Process 0 reads and writes the run's directory, and shares its answer or its error with all.
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
    """Call `jax.distributed.initialize` once. It detects arguments that are None (on Cloud TPU, Slurm, Open MPI).

    Raises:
        InputError: no cluster is detected, the other processes do not answer, or jax is in use already.
    """
    if jax.distributed.is_initialized():
        return
    # jax's own preemption service would swallow SIGTERM. `any_process` replaces it, for every signal.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator_address, num_processes, process_id)
    except ValueError as error:  # jax lacks an address or a number
        raise InputError(
            f"--distributed: {error} If jax detects no cluster, give cluster.coordinator_address (host:port of process 0), "
            "cluster.num_processes and cluster.process_id"
        ) from error
    except RuntimeError as error:  # jax is in use already, or no process answers
        raise InputError(f"--distributed: {error}") from error


def check_started() -> None:
    """Raise InputError if this is one of several processes and `start` was not called: checkpoints could not be written."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f"this host is one of {jax.process_count()}: give --distributed, and run the same command on all of them"
        )


def is_process_0() -> bool:
    """True in the process that writes files and prints."""
    return jax.process_index() == 0


@contextmanager
def all_or_none() -> Iterator[None]:
    """Run a block in every process; an error in one of them is an error in all.

    Inside the block no process may wait for another.

    Raises:
        InputError: in a process without an error of its own, if another process has one. The message names that process.
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
    """Run `action` in process 0 while the others wait. An error there is an error in all.

    Returns the result of `action` in process 0, and None in the others.
    """
    with all_or_none():
        return action() if is_process_0() else None


def check_shared(path: Path, *, seconds: float = 60.0) -> None:
    """Raise InputError in all processes if one of them does not see the file `path` that process 0 has written.

    Waits up to `seconds` for the file, because a network file system may show it late.
    """
    with all_or_none():
        limit = time.monotonic() + seconds
        while not path.is_file():
            if time.monotonic() > limit:
                raise InputError(
                    f"'{path}' does not exist on process {jax.process_index()}; give an output_dir that all hosts share"
                )
            time.sleep(0.1)


def check_equal(values: Mapping[str, Callable[[], str]]) -> None:
    """Raise InputError if processes have different values of one name, because they would train different models.

    With a single process the values are not computed.
    """
    for name, value in values.items() if jax.process_count() > 1 else ():
        theirs = _gather(hashlib.sha256(value().encode()).hexdigest())
        if other := next((i for i, value in enumerate(theirs) if value != theirs[0]), None):
            raise InputError(f"process {other} differs from process 0 in its {name}; give all hosts the same")


def any_process(requested: Callable[[], int | None], largest: Callable[[int], jax.Array]) -> Callable[[], int | None]:
    """Combine `requested` over all processes: if it returns a signal in any of them, all get it two calls later.

    Hosts receive signals at different moments, but all must stop at the same step, because a collective that one of them
    does not join never ends. The answer is reduced on the devices, behind the queued steps, and is read when those are
    done, so no step waits for it. All processes must call the function equally often. With a single process, `requested`
    is returned unchanged.

    Args:
        requested: returns a signal's number, or None.
        largest: reduces an int to the largest of all processes, on the devices (`DataParallel.largest`).
    """
    if jax.process_count() == 1:
        return requested
    asked: deque[jax.Array] = deque()

    def ask() -> int | None:
        asked.append(largest(requested() or 0))
        return int(asked.popleft()) or None if len(asked) > 2 else None

    return ask


def _gather(text: str) -> list[str]:
    """The `text` of every process, by process number, each cut to `_MESSAGE_BYTES`."""
    if jax.process_count() == 1:
        return [text]
    # Padded to a fixed size, because a collective needs the same shape in all processes.
    raw = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    raw[: len(data)] = data
    rows = multihost_utils.process_allgather(raw)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
