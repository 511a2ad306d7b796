"""From a traced peak to what must be free: what earlier runs have taught, and a margin."""

from __future__ import annotations

from ..memory.device import DeviceFacts
from ..units import MIB
from .plan import StagePrediction

# What a trace of live tensors does not see: the allocator's rounding of large blocks, and libraries' own workspaces.
# Estimates, not yet measured on a card; calibration takes their place run by run.
_MARGIN_RATIO = 0.03
_CUDA_LIBRARIES_BYTES = 64 * MIB

# Runs from which on their spread says more than the margin.
_TELLING_RUNS = 3


def expected_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """The traced peak, corrected by the worst of what runs on this device have shown."""
    ratios = device.calibration.of(prediction.stage.value)
    return prediction.peak_bytes if ratios is None else int(prediction.peak_bytes * ratios.highest)


def uncertainty_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """How far off the expectation may be: the spread of earlier runs, or as long as they are few the margin."""
    ratios = device.calibration.of(prediction.stage.value)
    if ratios is None or ratios.runs < _TELLING_RUNS:
        return needed_bytes(prediction, device) - expected_bytes(prediction, device)
    return int(prediction.peak_bytes * (ratios.highest - ratios.lowest))


def needed_bytes(prediction: StagePrediction, device: DeviceFacts) -> int:
    """The expectation with its margin: what must be free for the stage to run safely."""
    libraries_bytes = _CUDA_LIBRARIES_BYTES if device.torch_device.type == "cuda" else 0
    return int(expected_bytes(prediction, device) * (1 + _MARGIN_RATIO)) + libraries_bytes
