import os
import signal
import threading

import pytest

from jaxpeft.training import preemption
from jaxpeft.training.preemption import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_request_is_noted_and_a_later_one_acts_as_usual(number, monkeypatch):
    received = []
    before = signal.signal(number, lambda *_: received.append("usual"))
    try:
        usual = signal.getsignal(number)
        with stop_requests() as requested:
            assert requested() is None
            os.kill(os.getpid(), number)
            assert requested() == number
            assert received == []
            os.kill(os.getpid(), number)
            assert received == []  # within a second, it is the same request
            monkeypatch.setattr(preemption, "_GRACE_SECONDS", 0.0)
            os.kill(os.getpid(), number)
            assert received == ["usual"]
            assert requested() == number
        assert signal.getsignal(number) is usual
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    answers = []

    def run():
        with stop_requests() as requested:
            answers.append((requested(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [(None, before)]
