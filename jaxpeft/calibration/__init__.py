"""Measure a frozen model for initialisations from data: LoRA's EVA and LoRA-GA, and the choices of SHiRA and S²FT.

calibrated = calibrate(model, method, targets, batches, loss=loss)
frozen, adapters = init_adapters(
    model.params, calibrated.method, calibrated.targets, rng=rng, statistics=calibrated.statistics
)
"""

from jaxpeft.calibration.calibrate import Calibrated, calibrate
from jaxpeft.calibration.components import Components, input_components, record_inputs
from jaxpeft.calibration.gradients import kernel_gradients
from jaxpeft.calibration.magnitudes import input_magnitudes

__all__ = [
    "Calibrated",
    "Components",
    "calibrate",
    "input_components",
    "input_magnitudes",
    "kernel_gradients",
    "record_inputs",
]
