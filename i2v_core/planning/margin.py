"""The memory that must be free for a predicted peak: corrected by earlier runs, and with a margin."""

from __future__ import annotations

from ..memory.device import DeviceFacts
from ..units import MIB
from .plan import StagePrediction

# A trace of live tensors does not see the allocator's rounding of large blocks, and libraries' own workspaces.
# Estimates, not yet measured on a card; calibration replaces them run by run.
_MARGIN_RATIO = 0.03
_CUDA_LIBRARIES_BYTES = 64 * MIB

# From this many runs on, their spread says more than the margin.
_MIN_RUNS = 3


def expected_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """The predicted peak, corrected by the worst ratio of measured to predicted on this device."""
    ratios = device.calibration.of(prediction.stage.value)
    return prediction.peak_bytes if ratios is None else int(prediction.peak_bytes * ratios.highest)


def uncertainty_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """The possible error of `expected_bytes`: the spread of earlier runs, or the margin while they are few."""
    ratios = device.calibration.of(prediction.stage.value)
    if ratios is None or ratios.runs < _MIN_RUNS:
        return needed_bytes(prediction, device) - expected_bytes(prediction, device)
    return int(prediction.peak_bytes * (ratios.highest - ratios.lowest))


def needed_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """The expected peak with its margin, which must be free for the stage to run safely."""
    libraries_bytes = _CUDA_LIBRARIES_BYTES if device.torch_device.type == "cuda" else 0
    return int(expected_bytes(prediction, device) * (1 + _MARGIN_RATIO)) + libraries_bytes
