"""Measure the statistics that a method's initialisation needs, if any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxpeft.adapters import Lora, Method, Site, SiteMethod
from jaxpeft.calibration.components import input_components
from jaxpeft.calibration.gradients import kernel_gradients
from jaxpeft.calibration.magnitudes import input_magnitudes
from jaxpeft.models.build import Model
from jaxpeft.trees import Params


@dataclass(frozen=True)
class Calibrated:
    """Arguments for `init_adapters`.

    Attributes:
        method: the method, with the ranks and alphas that EVA chose per layer (`rank_pattern`, `alpha_pattern`).
        targets: the adapted layers, without those of rank 0 (EVA).
        statistics: the measurement by layer; empty if the initialisation needs none.
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
    """Measure the statistics from which `method` is initialised.

    A method that needs none is returned unchanged, and no batch is read.

    Args:
        model: the base model. It is measured with its parameters as they are.
        method: the adapter method for the `targets`.
        targets: the layers to adapt, by path.
        batches: batches as `jaxpeft.data` makes them. EVA reads them repeatedly until its components converge.
            All others read them once.
        loss: maps parameters and a batch to the mean loss in fp32, a scalar (for gradients).

    Raises:
        InputError: as `input_components`, `input_magnitudes` and `kernel_gradients`.
    """
    wanted = method.statistics if isinstance(method, SiteMethod) else None
    if wanted is None:
        return Calibrated(method, dict(targets), {})
    assert isinstance(method, SiteMethod)
    if wanted == "gradients":
        gradients = kernel_gradients(loss, model.params, targets, batches, needed_by=method.name)
        return Calibrated(method, dict(targets), gradients)
    if wanted == "magnitudes":
        return Calibrated(method, dict(targets), input_magnitudes(model, targets, batches, needed_by=method.name))
    assert isinstance(method, Lora), "only LoRA's EVA chooses ranks by components"
    found = input_components(model, method, targets, batches)
    return Calibrated(found.method, found.targets, found.components)
