"""What a stage is lent, and what it reports.

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
    """What a callback does that nobody has given."""


def _unknown() -> None:
    return None


def no_progress(done: int, total: int, latents_BCTHW: Tensor | None) -> None:
    """As `nothing`, of `on_progress`."""


def _no_status(status: StageStatus) -> None:
    pass


def _no_frames(frames_FHWC: Tensor) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What the caller lends to a stage.

    `check_cancelled` raises the caller's own exception to stop; it is called at least once a chunk.
    `on_progress` takes what is done, the total, and while sampling the clean latents so far (1, C, T, H, W);
    `on_status` what there is to say, from before the first step on; `on_frames` finished frames (f, H, W, 3) as they
    are decoded. `make_room` frees what it can of device memory that others hold, and `free_bytes` says what is free
    then; both are asked only when memory has run out.
    """

    device: torch.device
    attention: AttentionBackend = AttentionBackend.SDPA
    check_cancelled: Callable[[], None] = nothing
    on_progress: Callable[[int, int, Tensor | None], None] = no_progress
    on_status: Callable[[StageStatus], None] = _no_status
    on_frames: Callable[[Tensor], None] = _no_frames
    make_room: Callable[[], None] = nothing
    free_bytes: Callable[[], int | None] = _unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What a stage was predicted to take, give or take, what it took, and how long.

    `plan` is the one that it ended with, `notes` say what happened on the way. `failed` are attempts that ran out of
    memory: what they were predicted to take, and what they had taken by then. `timeline` shows them too.
    """

    stage: Stage
    plan: Plan
    predicted_peak_bytes: int
    uncertainty_bytes: int
    measured_peak_bytes: int
    seconds: float
    timeline: Timeline
    notes: tuple[str, ...] = ()
    failed: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.stage.value}: predicted {format_gib(self.predicted_peak_bytes)} ± "
            f"{format_gib(self.uncertainty_bytes)}, measured {format_gib(self.measured_peak_bytes)}, "
            f"{self.seconds:.1f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `retries` are the attempts that ran out of memory, `usable_bytes` is what the plan may use."""
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
