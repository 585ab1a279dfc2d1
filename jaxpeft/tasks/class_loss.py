"""The cross-entropy that training minimises: labels may be smoothed and classes weighted, as in torch's `CrossEntropyLoss`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.errors import InputError, did_you_mean

ClassWeights = Mapping[str, float] | Sequence[float] | Literal["balanced"]
"""The value of `training.class_weights`: name → weight, or the weights in the order of the ids, or a rule."""

_SHOWN = 20


def cross_entropy(
    logits: jax.Array, labels: jax.Array, weights: jax.Array, *, smoothing: float, class_weights: Sequence[float] | None
) -> tuple[jax.Array, jax.Array]:
    """The sum of the weighted losses and the sum of the weights, whose ratio is the mean of torch's `CrossEntropyLoss`.

    With v the class weights and ε the smoothing, a text of class y has the loss (1 − ε) · v_y · −log p_y + ε/classes · Σ_c v_c · −log p_c.
    The sum is divided by the sum of v_y.

    Args:
        logits: `[..., classes]`.
        labels: `[...]` int, the classes' ids.
        weights: `[...]`, 0 for labels that do not count.
        smoothing: ε, at least 0 and below 1.
        class_weights: a weight for each class; None: 1 for all.
    """
    losses = -jax.nn.log_softmax(logits)
    each = (
        jnp.ones(logits.shape[-1], logits.dtype) if class_weights is None else jnp.asarray(class_weights, logits.dtype)
    )
    own = jnp.take_along_axis(losses, labels[..., None], axis=-1)[..., 0]
    weight = weights * each[labels]
    total = (1 - smoothing) * (own * weight).sum()
    if smoothing:
        total += smoothing / logits.shape[-1] * ((losses * each).sum(-1) * weights).sum()
    return total, weight.sum()


def weights_of_classes(given: ClassWeights, labels: np.ndarray, names: Sequence[str]) -> tuple[float, ...]:
    """The weight of each class, in the order of the ids.

    "balanced" is rows / (classes · rows of the class), as in scikit-learn; a class without a row has the weight 0 and is not among the
    classes. In a mapping, classes that are not named have the weight 1.

    Args:
        given: the value of `training.class_weights`.
        labels: `[rows]` int, the classes' ids of the training rows.
        names: the classes' names, or their ids as text.

    Raises:
        InputError: a name is unknown, a list has the wrong length, or no training row has a class with a weight.
    """
    counts = np.bincount(labels, minlength=len(names))
    if given == "balanced":
        each = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1.0))
        return tuple(float(weight) if count else 0.0 for weight, count in zip(each, counts, strict=True))
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                near = did_you_mean(name, names) or f"; classes: {_listed(names)}"
                raise InputError(f"training.class_weights: there is no class '{name}'{near}")
        weights = tuple(float(given.get(name, 1.0)) for name in names)
    else:
        weights = tuple(map(float, given))
    if len(weights) != len(names):
        raise InputError(
            f"training.class_weights has {len(weights)} weights, and there are {len(names)} classes ({_listed(names)}); give one for each"
        )
    if not any(weight and count for weight, count in zip(weights, counts, strict=True)):
        raise InputError("training.class_weights: no training row has a class with a weight above 0; give one a weight")
    return weights


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
