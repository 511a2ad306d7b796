"""Services that the caller provides to a stage, and the report that the stage returns.

Shape legend: C latent channels, T latent frames, f pixel frames, H/W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..memory.timeline import Timeline
from ..placement.attention import AttentionBackend
from ..planning.plan import Plan, Stage
from ..units import format_gib
from .status import StageStatus


def nothing() -> None:
    """Default of callbacks without arguments."""


def _unknown() -> None:
    return None


def no_progress(done: int, total: int, latents_BCTHW: Tensor | None) -> None:
    """Default of `on_progress`."""


def _no_status(status: StageStatus) -> None:
    pass


def _no_frames(frames_FHWC: Tensor) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """Services that the caller provides to a stage."""

    device: torch.device
    attention: AttentionBackend = AttentionBackend.SDPA

    check_cancelled: Callable[[], None] = nothing
    """Raises the caller's own exception to stop the stage. Called at least once per chunk."""

    on_progress: Callable[[int, int, Tensor | None], None] = no_progress
    """Takes what is done, the total, and while sampling the clean latents so far (1, C, T, H, W)."""

    on_status: Callable[[StageStatus], None] = _no_status
    """Takes the current status, first before the first step."""

    on_frames: Callable[[Tensor], None] = _no_frames
    """Takes finished frames (f, H, W, 3) as they are decoded."""

    make_room: Callable[[], None] = nothing
    """Frees device memory that others hold. Called only after memory has run out."""

    free_bytes: Callable[[], int | None] = _unknown
    """Returns the free bytes of device memory, None where unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """Predicted and measured memory and time of a finished stage."""

    stage: Stage

    plan: Plan
    """The plan that the stage ended with."""

    predicted_peak_bytes: int

    uncertainty_bytes: int
    """Expected error of the prediction, in either direction."""

    measured_peak_bytes: int
    seconds: float

    timeline: Timeline
    """Memory over time, failed attempts included."""

    notes: tuple[str, ...] = ()
    """Events that the user should know of, in words."""

    failed: tuple[tuple[int, int], ...] = ()
    """Predicted peak, and peak until the failure, of each attempt that ran out of memory (bytes)."""

    def __str__(self) -> str:
        return (
            f"{self.stage.value}: predicted {format_gib(self.predicted_peak_bytes)} ± "
            f"{format_gib(self.uncertainty_bytes)}, measured {format_gib(self.measured_peak_bytes)}, "
            f"{self.seconds:.1f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON. `retries` are the attempts that ran out of memory."""
        return {
            "stage": self.stage.value,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "uncertainty_bytes": self.uncertainty_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "usable_bytes": self.plan.budget.usable_bytes,
            "seconds": round(self.seconds, 3),
            "retries": [
                {"predicted_peak_bytes": predicted, "measured_peak_bytes": measured}
                for predicted, measured in self.failed
            ],
            "notes": list(self.notes),
            "timeline": self.timeline.as_dict(),
        }
