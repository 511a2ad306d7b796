"""One video of a batch: its specification and its state in the queue."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ...errors import BadInputError
from ...families import VideoSize
from ...families.facts import AUTO_SCHEDULER
from ...placement.precision import AUTO, PRECISIONS
from ...sampling.schedulers import SCHEDULERS
from ...stages import SamplerSettings
from ...video import VideoSettings

MAX_SEED = 2**64 - 1
MAX_PRIORITY = 1000.0
MAX_MOTION_BUCKET = 1023
_KEY_CHARACTERS, _STEM_CHARACTERS = 12, 80
_NOT_IN_NAMES = re.compile(r"[^\w.-]+")


class JobState(str, Enum):
    """State of a job in the queue. `WAITING` and `PAUSED` jobs have not been started, or were released."""

    WAITING = "waiting"
    PAUSED = "paused"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A video to be made.

    Raises:
        BadInputError: a value is outside of its range.
    """

    model: Path
    image: Path
    prompt: str
    size: VideoSize
    steps: int
    cfg: float
    fps: float
    negative: str = ""
    seed: int = 0
    motion_bucket: int = 127
    """Amount of motion, 0 to 1023; for SVD alone."""
    noise_augmentation: float = 0.02
    """Share of noise added to the picture, 0 to 1; for SVD alone."""
    scheduler: str = AUTO_SCHEDULER
    precision: str = AUTO
    allow_approximate: bool = False
    """Whether plans may use weights or windows whose result differs from the exact one."""
    format: str = "mp4"
    quality: int = 19
    priority: float = 1.0
    image_digest: str = ""
    """Hash of the picture's content, which tells it from others wherever its file is."""
    model_identity: str = ""
    """Hash of the model's weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= MAX_SEED:
            raise BadInputError(f"a seed of {self.seed} is not possible", f"use 0 to {MAX_SEED}")
        check_priority(self.priority)
        if not 0 <= self.motion_bucket <= MAX_MOTION_BUCKET:
            raise BadInputError(
                f"a motion bucket of {self.motion_bucket} is not possible", f"use 0 to {MAX_MOTION_BUCKET}"
            )
        if not 0 <= self.noise_augmentation <= 1:
            raise BadInputError(f"a noise augmentation of {self.noise_augmentation:g} is not possible", "use 0 to 1")
        if self.scheduler not in SCHEDULERS:
            raise BadInputError(f"'{self.scheduler}' is not a scheduler", f"choose one of {', '.join(SCHEDULERS)}")
        if self.precision != AUTO and self.precision not in PRECISIONS:
            raise BadInputError(
                f"'{self.precision}' is not a precision", f"choose one of {', '.join((AUTO, *PRECISIONS))}"
            )
        _ = (self.sampler, self.video)  # which check their own values

    @property
    def sampler(self) -> SamplerSettings:
        return SamplerSettings(steps=self.steps, cfg=self.cfg, seed=self.seed, scheduler=self.scheduler)

    @property
    def video(self) -> VideoSettings:
        return VideoSettings(format=self.format, fps=self.fps, quality=self.quality)

    @property
    def guidance(self) -> bool:
        return self.cfg != 1

    @property
    def key(self) -> str:
        """Hash that is the same for the same video, whatever its priority and wherever its picture is."""
        parts = {name: value for name, value in self.as_dict().items() if name not in ("priority", "image", "model")}
        parts |= {"image": self.image_digest or str(self.image), "model": self.model_identity or str(self.model)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def output_name(self) -> str:
        """Name of the video's file or folder: the picture's, with enough of the key to be unique."""
        stem = _NOT_IN_NAMES.sub("_", self.image.stem)[:_STEM_CHARACTERS].strip("._") or "video"
        return f"{stem}-{self.key[:_KEY_CHARACTERS]}{self.video.facts.suffix}"

    def as_dict(self) -> dict[str, Any]:
        """JSON values, which `from_dict` reads."""
        return {**asdict(self), "size": asdict(self.size), "model": str(self.model), "image": str(self.image)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JobSpec:
        rest: dict[str, Any] = {name: it for name, it in values.items() if name not in ("model", "image", "size")}
        return cls(model=Path(values["model"]), image=Path(values["image"]), size=VideoSize(**values["size"]), **rest)


def check_priority(priority: float) -> None:
    if not 0 < priority <= MAX_PRIORITY or not math.isfinite(priority):
        raise BadInputError(
            f"a priority of {priority:g} is not possible", f"use a number above 0, up to {MAX_PRIORITY:g}; 1 is usual"
        )


class StopRequest(str, Enum):
    """Request to stop a running job, which its owner applies."""

    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job with its state, as the queue had it when it was read. Times are seconds since the epoch."""

    id: int
    spec: JobSpec
    state: JobState
    position: int | None
    """Place that a user has given it, before all jobs without one."""
    stop_request: StopRequest | None
    added_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    """Runs that have failed so far."""
    crashes: int
    """Runs whose process died."""
    owner: str | None
    """Process that runs it."""
    device: str | None
    stage: str | None
    done: int
    """Steps or frames of `stage` that are made, of `total`."""
    total: int
    predicted_seconds: float | None
    predicted_bytes: int | None
    measured_bytes: int | None
    output: Path | None
    thumbnail: Path | None
    problem: str | None
    """Why its last run failed."""
    report: dict[str, Any] | None
    """Seconds and bytes that its stages took."""

    def seconds_left(self, now: float) -> float | None:
        """Predicted seconds less those that it has run; None without a prediction, 0 in a final state."""
        if self.state.is_final:
            return 0.0
        if self.predicted_seconds is None:
            return None
        run = 0.0 if self.state is not JobState.RUNNING or self.started_at is None else now - self.started_at
        return max(0.0, self.predicted_seconds - run)
