"""Stopping in good order: a preempted machine sends SIGTERM and a person presses Ctrl-C; neither may lose the run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Yield a function that says whether SIGTERM or SIGINT has come: its number, or None. A second one acts as usual."""
    received: list[int] = []
    previous: dict[int, signal.Handlers | Callable | int | None] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

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
