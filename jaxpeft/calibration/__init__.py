"""Measure a frozen model for LoRA's data-driven initialisations: input components for EVA, kernel gradients for LoRA-GA.

calibrated = calibrate(model, method, targets, batches, loss=loss)
frozen, adapters = init_adapters(
    model.params, calibrated.method, calibrated.targets, rng=rng, statistics=calibrated.statistics
)
"""

from jaxpeft.calibration.calibrate import Calibrated, calibrate
from jaxpeft.calibration.components import Components, input_components, record_inputs
from jaxpeft.calibration.gradients import kernel_gradients

__all__ = ["Calibrated", "Components", "calibrate", "input_components", "kernel_gradients", "record_inputs"]
