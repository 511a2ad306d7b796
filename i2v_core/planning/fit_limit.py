"""The one test of whether a stage fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..memory.device import DeviceFacts
from .margin import needed_bytes
from .plan import StagePrediction
from .request import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class FitLimit:
    """The most memory that a stage may need.

        limit = FitLimit.of(budget, device)
        limit.allows(prediction)

    The planner, fallbacks, suggestions and batches all ask this.
    """

    device_bytes: int

    host_bytes: int | None = None
    """None: any amount."""

    margin_of: DeviceFacts | None = None
    """The device whose calibration and margin are added to a prediction. None compares bare predictions, for
    candidates that are measured against another prediction, not against a device."""

    @classmethod
    def of(cls, budget: Budget, device: DeviceFacts) -> FitLimit:
        return cls(device_bytes=budget.usable_bytes, host_bytes=budget.host_free_bytes, margin_of=device)

    @property
    def any_host(self) -> FitLimit:
        """The same for the device, with host memory left out."""
        return replace(self, host_bytes=None)

    def allows(self, prediction: StagePrediction) -> bool:
        device_bytes = prediction.peak_bytes if self.margin_of is None else needed_bytes(prediction, self.margin_of)
        fits_host = self.host_bytes is None or prediction.host_bytes <= self.host_bytes
        return device_bytes <= self.device_bytes and fits_host
