"""Stop cleanly on SIGTERM (sent when a machine is preempted) and on Ctrl-C, so that the run is not lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_GRACE_SECONDS = 1.0


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the number of the first SIGTERM or SIGINT received, or None.

    A later signal acts as usual, except within a second of the first: schedulers send SIGTERM to every process of a job,
    and a parent that forwards its own sends another one.
    """
    received: list[int] = []
    first = 0.0
    previous: dict[int, signal.Handlers | Callable | int | None] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif time.monotonic() - first > _GRACE_SECONDS:
            # Hand over to the handler from before, such as Python's own for Ctrl-C.
            signal.signal(number, previous[number])
            signal.raise_signal(number)
            return
        received.append(number)

    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not in the main thread: the program that called us handles the signals
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
