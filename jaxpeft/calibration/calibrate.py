"""The measurement that a method's start asks for, if any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxpeft.adapters import Lora, Method, Site
from jaxpeft.calibration.components import input_components
from jaxpeft.calibration.gradients import kernel_gradients
from jaxpeft.models.build import Model
from jaxpeft.trees import Params


@dataclass(frozen=True)
class Calibrated:
    """What `init_adapters` takes.

    Attributes:
        method: with the ranks and alphas that EVA gives the layers (`rank_pattern`, `alpha_pattern`).
        targets: the adapted layers, less those that EVA gives rank 0.
        statistics: by layer, what was measured there; empty where the start needs nothing.
    """

    method: Method | None
    targets: dict[str, Site]
    statistics: dict[str, jax.Array]


def calibrate(
    model: Model,
    method: Method | None,
    targets: Mapping[str, Site],
    batches: Collection[Mapping[str, Any]],
    *,
    loss: Callable[[Params, Mapping[str, Any]], jax.Array],
) -> Calibrated:
    """Measure what the start of `method` is made from; any other method comes back as it is, and no batch is looked at.

    Args:
        model: the base; its parameters are measured as they are.
        method: what is learned at the `targets`.
        targets: the layers to adapt, by path.
        batches: what to measure on, as `jaxpeft.data` makes them. EVA goes through them until its components stand
            still; LoRA-GA goes through them once.
        loss: maps parameters and a batch to the mean loss in fp32, a scalar (LoRA-GA).

    Raises:
        InputError: as `input_components` and `kernel_gradients`.
    """
    if not isinstance(method, Lora) or not method.needs_statistics:
        return Calibrated(method, dict(targets), {})
    if method.init_lora_weights == "lora_ga":
        return Calibrated(method, dict(targets), kernel_gradients(loss, model.params, targets, batches))
    found = input_components(model, method, targets, batches)
    return Calibrated(found.method, found.targets, found.components)
