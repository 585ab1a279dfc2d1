"""Differences of methods on the same seeds, with the interval that chance leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over `num_pairs` seeds, and the interval that it lies in with `CONFIDENCE`.

    `low`, `high` and `p_value` (of Student's paired test) are None where one pair leaves nothing to resample.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    num_pairs: int

    @property
    def is_distinguishable(self) -> bool:
        """Whether the interval leaves 0 out, and a paired t-test would not call that chance.

        The interval alone would be wrong too often: of n pairs it leaves 0 out where all differences have one sign, which chance brings
        about one time in 2^(n-1), with three seeds one in four.
        """
        if self.low is None or self.high is None or self.p_value is None:
            return False
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - CONFIDENCE


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference `ours − theirs`, paired by position, with a percentile bootstrap interval (Efron 1979) and a t-test (Student 1908).

    Pairing takes out what both share of a seed: its order of the data and its start.

    Raises:
        ValueError: for sequences of unequal length, or empty ones.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    differences = np.subtract(ours, theirs, dtype=np.float64)
    mean = float(differences.mean())
    # Equal but for rounding counts as equal: there is nothing to resample then.
    if len(differences) == 1 or np.ptp(differences) <= 1e-9 * np.abs(differences).max():
        if len(differences) == 1:
            return Difference(mean, None, None, None, 1)
        return Difference(mean, mean, mean, float(mean == 0), len(differences))
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),  # the same report from the same runs
    ).confidence_interval
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean, float(interval.low), float(interval.high), p_value, len(differences))
