"""Run a comparison's jobs as processes (`worker.py`): start them, stop them cleanly, and lock the comparison's directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxpeft.report.console import log
from jaxpeft.runs.lock import locked

_LOCK = ".lock"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_held: list[int] = []
"""File descriptors of locks. Workers inherit them, so a worker whose parent was killed holds the lock until it ends."""


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Lock `directory` against other comparisons while the block runs.

    Raises:
        InputError: another process holds the lock.
    """
    (directory / _LOCK).touch()
    refusal = f"another process is working on the comparison in '{directory}'; wait for it, or stop it"
    with locked(directory / _LOCK, refusal) as file:
        _held.append(file.fileno())
        try:
            yield
        finally:
            _held.remove(file.fileno())


def do(job: dict[str, Any], **environment: str) -> str | None:
    """Run a job in a new process with additional `environment` variables. Returns None, or why the process failed.

    Raises:
        SystemExit: 128 + signal, if a signal arrives. The job saves its state first.
    """
    # transformers would import these frameworks if they are installed.
    frameworks = {"USE_TORCH": "0", "USE_TF": "0"}
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxpeft.comparison.worker"],
        stdin=subprocess.PIPE,
        env={**frameworks, **os.environ, **environment},
        pass_fds=_held,
        start_new_session=True,  # so that Ctrl-C and a closed terminal reach it only once, through this process
        text=True,
    )
    stopped: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        if not stopped:  # only once: a second signal would end the worker before it has saved
            process.send_signal(signal.SIGTERM)
        stopped.append(number)

    # Signals that are ignored stay ignored, as SIGHUP is under nohup.
    before = {
        number: signal.signal(number, pass_on) for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        process.communicate(json.dumps(job))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    status = process.returncode
    if stopped or status in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        log("stopped; run the same command again to continue")
        raise SystemExit(128 + stopped[0] if stopped else status)
    return None if not status else _describe_status(status)


def _describe_status(status: int) -> str:
    return (
        f"its process ended with signal {signal.Signals(-status).name}"
        if status < 0
        else f"its process ended with status {status}"
    )
