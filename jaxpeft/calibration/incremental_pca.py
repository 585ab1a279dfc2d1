"""Principal components of rows that arrive in batches (Ross et al. 2008, IJCV 77, section 3; scikit-learn's IncrementalPCA)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxpeft.adapters.lora_init.weight_driven import randomized_svd


@dataclass(frozen=True)
class Fit:
    """Statistics of the rows so far.

    Attributes:
        count: number of rows.
        mean: `[d]`, float64.
        spread: the sum of the rows' squared distances from the mean.
        components: `[k, d]`, orthonormal, the strongest first; the largest entry of each is positive.
        singular_values: `[k]`, of the centred rows.
        similarity: `[k]`, the cosine of each component with its value before the last batch; 0 after the first batch.
    """

    count: int
    mean: np.ndarray
    spread: float
    components: np.ndarray
    singular_values: np.ndarray
    similarity: np.ndarray

    @property
    def explained(self) -> np.ndarray:
        """The share of the variance along each component, `[k]`."""
        return self.singular_values**2 / self.spread


def updated(fit: Fit | None, rows: np.ndarray, k: int) -> Fit:
    """Update `fit` (None before the first batch) with `rows: [n, d]` in float32. Keeps `k` components, at most n and d."""
    mean = rows.mean(axis=0, dtype=np.float64)
    centred = rows - mean.astype(np.float32)
    count, spread = len(rows), float(np.square(centred, dtype=np.float64).sum())
    if fit is not None:
        # One more row represents the distance between the old mean and that of the new rows.
        apart = np.sqrt(fit.count * count / (fit.count + count)) * (fit.mean - mean)
        strengths = fit.singular_values[:, None] * fit.components
        centred = np.vstack([strengths, centred, apart[None].astype(np.float32)])
        spread += fit.spread + float(apart @ apart)
        mean = (fit.count * fit.mean + count * mean) / (fit.count + count)
        count += fit.count
    values, components = _strongest(centred, k)
    # The sign of a component is arbitrary. Fix it, or a flipped one would look as if it had not converged.
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = components * np.sign(largest)
    similarity = np.zeros(k, np.float32) if fit is None else (components * fit.components).sum(axis=1)
    return Fit(count, mean, spread, components, values, similarity)


def _strongest(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k singular values and right singular vectors: if k is small approximately, as in PEFT.

    The approximation takes 2k random directions and 4 power iterations.
    """
    if 2 * k >= min(rows.shape):
        _, values, vectors = np.linalg.svd(rows, full_matrices=False)
    else:
        # PEFT's seed. Any other gives the same components to about 1e-5.
        sketch = np.random.default_rng(42).standard_normal((min(rows.shape), 2 * k), np.float32)
        _, values, vectors = randomized_svd(rows, sketch, rounds=4)
    return values[:k], vectors[:k]
