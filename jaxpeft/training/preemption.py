"""Stopping in good order: a preempted machine sends SIGTERM and a person presses Ctrl-C; neither may lose the run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_GRACE_SECONDS = 1.0


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yield a function that says whether SIGTERM or SIGINT has come: its number, or None. One that comes later acts as usual.

    Not one within a second: schedulers send SIGTERM to every process of a job, and a parent that passes its own on sends another.
    """
    received: list[int] = []
    first = 0.0
    previous: dict[int, signal.Handlers | Callable | int | None] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
        elif time.monotonic() - first > _GRACE_SECONDS:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
            return
        received.append(number)

    try:
        for number in (int(signal.SIGTERM), int(signal.SIGINT)):
            previous[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: someone else's program handles its signals
        pass
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
