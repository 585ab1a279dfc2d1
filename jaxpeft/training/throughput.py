"""Measure training while it runs: metrics that stay on the device until a log point, time, and tokens."""

from __future__ import annotations

import functools
import math
import time

import jax
import numpy as np

from jaxpeft.training.step import Metrics


class ThroughputMeter:
    """Keeps metrics on the device between log points, and counts the time and tokens of micro-steps.

    A metric has one value per micro-step, `[micro-steps]`, or if runs train together one for each of them,
    `[micro-steps, replicas]`.
    """

    def __init__(self, start: int) -> None:
        """`start` is the number of steps done already."""
        self._pending: list[tuple[Metrics, int]] = []
        self._all_tokens: np.ndarray = np.zeros(())
        self._all_seconds, self._all_steps = 0.0, 0
        self._since, self._last = time.monotonic(), start
        self._compiled = -1.0  # leaves the first interval out of the speed: it starts cold even if nothing is compiled
        self.seconds_per_step = math.inf
        """Seconds per step in the newest log interval."""

    def add(self, metrics: Metrics, num_micro_steps: int) -> None:
        """Add the metrics of one dispatch, `[num_micro_steps or more]` each, and wait for the dispatch before it.

        So the devices have exactly one dispatch queued. A stop signal, which takes effect behind the queue, thus need not
        wait for a whole log interval, and batches do not pile up on the devices. The metrics stay on the devices.
        """
        if self._pending:
            jax.block_until_ready(self._pending[-1][0])
        self._pending.append((metrics, num_micro_steps))

    def pending(self) -> dict[str, np.ndarray]:
        """Wait for the micro-steps since the last log point and return their metrics, in order. Empty if there are none."""
        fetched = jax.device_get([metrics for metrics, _ in self._pending])
        counts = [count for _, count in self._pending]
        return {
            key: np.concatenate([metrics[key][:count] for metrics, count in zip(fetched, counts, strict=True)])
            for key in (fetched[0] if fetched else ())
        }

    def flush(self, step: int) -> dict[str, np.ndarray]:
        """The means of the metrics since the last log point, and `tokens_per_second`. `step` is the number of steps done."""
        values = self.pending()
        seconds, steps = time.monotonic() - self._since, step - self._last
        tokens = values.pop("tokens").sum(axis=0)
        means = {key: np.mean(value, axis=0) for key, value in values.items()}
        compiled = seconds_compiling()
        if compiled == self._compiled:  # nothing was compiled in this interval, so it counts for the run's speed
            self._all_tokens = self._all_tokens + tokens
            self._all_seconds += seconds
            self._all_steps += steps
        self.seconds_per_step = seconds / max(steps, 1)
        self._pending, self._last, self._compiled, self._since = [], step, compiled, time.monotonic()
        return {**means, "tokens_per_second": tokens / max(seconds, 1e-9)}

    def leave_out(self, seconds: float) -> None:
        """Exclude the last `seconds` from the speed, because they were no training (but a validation)."""
        self._since += seconds
        # If the interval has no micro-steps yet, only the validation compiled programs: the interval still counts.
        if not self._pending:
            self._compiled = seconds_compiling()

    @property
    def tokens_per_second(self) -> np.ndarray:
        """Real tokens per second over all intervals except the first and those that compiled a program."""
        return self._all_tokens / self._all_seconds if self._all_seconds else np.zeros_like(self._all_tokens)

    @property
    def mean_seconds_per_step(self) -> float:
        """Seconds per step over the same intervals, or 0.0 if there are none."""
        return self._all_seconds / self._all_steps if self._all_steps else 0.0


def seconds_compiling() -> float:
    """Seconds this process has spent compiling since the first call of this function. Cached programs take less."""
    return sum(_listened())


@functools.cache
def _listened() -> list[float]:
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds


def first_bad_step(losses: np.ndarray, step: int, accumulation_steps: int) -> int | None:
    """The step of the first loss of `losses: [micro-steps]` that is not finite, or None. The last loss belongs to `step`."""
    bad = np.flatnonzero(~np.isfinite(losses))
    return step - (len(losses) - 1 - int(bad[0])) // accumulation_steps if len(bad) else None
