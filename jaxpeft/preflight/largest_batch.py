"""Find the largest batch that fits, by bisection with guesses from a straight line through the sizes compiled so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

QUANTUM = 8
"""Rows per chip. Arrays are laid out in tiles of eight rows, so numbers in between save no memory."""


@dataclass(frozen=True)
class Attempt:
    """One compilation: rows per chip, whether it fits, and the bytes that it needs per chip (None if unknown)."""

    rows: int
    fits: bool
    needed_bytes: float | None


@dataclass(frozen=True)
class Largest:
    """The result of the search.

    Attributes:
        rows: the most rows per chip that fit; 0 if not even one did.
        too_many: the fewest rows per chip that did not fit; None if all fit.
        attempts: all compilations, in order.
    """

    rows: int
    too_many: int | None
    attempts: tuple[Attempt, ...]


def largest_batch(
    compile_rows: Callable[[int], Attempt],
    first: Attempt,
    *,
    fixed_bytes: float,
    limit_bytes: float,
    most: int | None = None,
    tolerance: float = 0.05,
    max_attempts: int = 8,
) -> Largest:
    """Find the largest number of rows that fits on a chip.

    Args:
        compile_rows: compiles for the given number of rows per chip.
        first: an attempt that was already made.
        fixed_bytes: memory of a chip that does not depend on the batch: weights and optimizer.
        limit_bytes: memory that a chip has.
        most: upper bound of the search in rows per chip, `first.rows` or more; None: no bound.
        tolerance: stop if the fewest rows that do not fit are at most this share (or one `QUANTUM`) above the most that do.
        max_attempts: compilations in addition to `first`. Each takes about a minute.
    """
    attempts = [first]
    for _ in range(max_attempts):
        low, high = _bounds(attempts)
        if low == most or (high is not None and high - low <= max(QUANTUM if low >= QUANTUM else 1, tolerance * low)):
            break
        rows = _next_rows(attempts, low, high, fixed_bytes, limit_bytes, tolerance)
        attempts.append(compile_rows(rows if most is None else min(rows, most)))
    low, high = _bounds(attempts)
    return Largest(low, high, tuple(attempts))


def _bounds(attempts: list[Attempt]) -> tuple[int, int | None]:
    """The most rows that fit (or 0), and the fewest that do not (or None)."""
    too_many = [attempt.rows for attempt in attempts if not attempt.fits]
    return max((attempt.rows for attempt in attempts if attempt.fits), default=0), min(too_many, default=None)


def _next_rows(
    attempts: list[Attempt], low: int, high: int | None, fixed_bytes: float, limit_bytes: float, tolerance: float
) -> int:
    """The next number of rows to try, inside (low, high): first the line's prediction, then just beyond it."""
    guess = _predicted(attempts, fixed_bytes, limit_bytes)
    if high is None:
        # At least a little more than what fits, and not too far beyond the sizes that are known.
        guess = min(max(guess or 2 * low, low + max(QUANTUM, tolerance * low)), 64 * max(low, QUANTUM))
        return _rounded(guess)
    if guess is None or not low < guess < high or len(attempts) > 4:
        guess = (low + high) / 2  # the line predicts badly, so bisect
    elif guess <= low * (1 + tolerance / 2):
        guess = low * (1 + tolerance)
    return min(max(_rounded(guess), low + 1), high - 1)


def _predicted(attempts: list[Attempt], fixed_bytes: float, limit_bytes: float) -> float | None:
    """The rows at which a line through the two sizes nearest to the limit meets it. With one size, `fixed_bytes` is the other."""
    known = [(abs(each.needed_bytes - limit_bytes), each) for each in attempts if each.needed_bytes]
    nearest = [each for _, each in sorted(known, key=lambda pair: pair[0])[:2]]
    points = [(each.rows, float(each.needed_bytes or 0)) for each in nearest]
    if len(points) < 2:
        points.append((0, fixed_bytes))
    (rows, size), (other_rows, other_size) = points[0], points[1]
    if rows == other_rows or (size - other_size) / (rows - other_rows) <= 0:
        return None
    return rows + (limit_bytes - size) * (rows - other_rows) / (size - other_size)


def _rounded(rows: float) -> int:
    return int(rows // QUANTUM * QUANTUM) if rows >= QUANTUM else max(int(rows), 1)
