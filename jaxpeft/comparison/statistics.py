"""Differences between methods on the same seeds, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over `num_pairs` seeds, with its interval [`low`, `high`] at `CONFIDENCE`.

    `low`, `high` and `p_value` (of Student's paired t-test) are None for a single pair, which cannot be resampled.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    num_pairs: int

    @property
    def is_distinguishable(self) -> bool:
        """True if the interval excludes 0 and a paired t-test has p < 1 - `CONFIDENCE`.

        The interval on its own would be wrong too often. For n pairs it excludes 0 if all differences have one sign, which
        happens by chance one time in 2^(n-1): with three seeds, one in four.
        """
        if self.low is None or self.high is None or self.p_value is None:
            return False
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - CONFIDENCE


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """The difference `ours − theirs`, paired by position, with a percentile bootstrap interval (Efron 1979) and a t-test (Student 1908).

    Pairing removes the effects that both share because of the seed: data order and initialisation.

    Raises:
        ValueError: the sequences differ in length, or are empty.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"{len(ours)} values cannot be paired with {len(theirs)}")
    differences = np.subtract(ours, theirs, dtype=np.float64)
    mean = float(differences.mean())
    # Differences that are equal up to rounding cannot be resampled.
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
        rng=np.random.default_rng(0),  # fixed, so that the same runs give the same report
    ).confidence_interval
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(mean, float(interval.low), float(interval.high), p_value, len(differences))
