"""The zeros of a pruned base: their pattern, and a merged kernel that keeps them.

An adapter's update is dense, so merging fills the zeros of a pruned base. The projection sets these entries to zero again. That
drops a part of the update; `KeptZeros` measures it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

_GROUPS = (4, 8, 16, 32)
"""Values of M that are looked for."""


@dataclass(frozen=True)
class KeptZeros:
    """The cost of keeping the zeros of one kernel.

    Attributes:
        zeros: share of the base's kernel that is zero.
        pattern: (N, M) if at most N of M consecutive weights of an output are not zero; None: unstructured.
        update_norm: Frobenius norm of merged − base, before the projection.
        dropped_norm: the same of the part that the projection drops.
    """

    zeros: float
    pattern: tuple[int, int] | None
    update_norm: float
    dropped_norm: float

    @property
    def dropped(self) -> float:
        """The dropped share of the update's norm, from 0 to 1."""
        return self.dropped_norm / self.update_norm if self.update_norm else 0.0


def keep_zeros(frozen_kernel: jax.Array, merged: jax.Array) -> jax.Array:
    """`merged: [in, out]` with zeros at the zeros of `frozen_kernel`, in the dtype of `merged`."""
    return jnp.where(frozen_kernel == 0, jnp.zeros((), merged.dtype), merged)


def cost_of_zeros(frozen_kernel: jax.Array, merged: jax.Array) -> KeptZeros:
    """What `keep_zeros` costs, for two kernels `[in, out]` in fp32."""
    is_zero = np.asarray(frozen_kernel) == 0
    update = np.asarray(merged, np.float64) - np.asarray(frozen_kernel, np.float64)
    return KeptZeros(
        zeros=float(is_zero.mean()),
        pattern=n_of_m(frozen_kernel),
        update_norm=float(np.linalg.norm(update)),
        dropped_norm=float(np.linalg.norm(update[is_zero])),
    )


def dropped_in_total(costs: Iterable[KeptZeros]) -> float:
    """The dropped share of the norm of the update of all layers together."""
    costs = list(costs)
    update = math.hypot(*(cost.update_norm for cost in costs))
    return math.hypot(*(cost.dropped_norm for cost in costs)) / update if update else 0.0


def n_of_m(kernel: jax.Array) -> tuple[int, int] | None:
    """N:M sparsity of a `kernel: [in, out]` along the contraction axis (`in`), such as (2, 4); None if there is none.

    M is the smallest of 4, 8, 16 and 32 for which no group of M consecutive weights of an output has more than N ≤ M/2 that are
    not zero, and at least 90 % of the N places are filled. The last condition tells 2:4 from weights that are sparse at random.
    """
    used = np.asarray(kernel) != 0
    for m in _GROUPS:
        if used.shape[0] % m:
            continue
        in_group = used.reshape(-1, m, used.shape[1]).sum(1)
        n = int(in_group.max(initial=0))
        if 0 < n <= m // 2 and in_group.mean() >= 0.9 * n:
            return n, m
    return None
