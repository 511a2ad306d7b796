"""One video of a batch: what is asked for, and where it stands."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
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
    """Where a job stands. `WAITING` and `PAUSED` ones have not been taken up, or were given back."""

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
    """A video to be made. Raises `BadInputError` for values that cannot be.

    `image_digest` tells the picture from others by its content, `model_identity` the model's weights.
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
    noise_augmentation: float = 0.02
    scheduler: str = AUTO_SCHEDULER
    precision: str = AUTO
    allow_approximate: bool = False
    format: str = "mp4"
    quality: int = 19
    priority: float = 1.0
    image_digest: str = ""
    model_identity: str = ""

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
            raise BadInputError(f"'{self.scheduler}' is no scheduler", f"choose one of {', '.join(SCHEDULERS)}")
        if self.precision != AUTO and self.precision not in PRECISIONS:
            raise BadInputError(
                f"'{self.precision}' is no precision", f"choose one of {', '.join((AUTO, *PRECISIONS))}"
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
        """The same for the same video, whatever its priority and wherever its picture lies."""
        parts = {name: value for name, value in self.as_dict().items() if name not in ("priority", "image", "model")}
        parts |= {"image": self.image_digest or str(self.image), "model": self.model_identity or str(self.model)}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def output_name(self) -> str:
        """Name of the video's file or folder: after the picture, with enough of the key to be no other video's."""
        stem = _NOT_IN_NAMES.sub("_", self.image.stem)[:_STEM_CHARACTERS].strip("._") or "video"
        return f"{stem}-{self.key[:_KEY_CHARACTERS]}{self.video.facts.suffix}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
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
    """What is asked of a job that runs; whoever runs it grants it."""

    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job, where it stands, and what is known of it. Times are seconds since the epoch.

    `position` is the place that a user has given it, before all that have none. `attempts` have failed so far;
    `crashes` are runs whose process ended in the middle. `done` of `total` steps or frames of `stage` are made.
    `report` holds what the stages took, `problem` why the job failed last.
    """

    id: int
    spec: JobSpec
    state: JobState
    position: int | None
    stop_request: StopRequest | None
    added_at: float
    started_at: float | None
    finished_at: float | None
    attempts: int
    crashes: int
    owner: str | None
    device: str | None
    stage: str | None
    done: int
    total: int
    predicted_seconds: float | None
    predicted_bytes: int | None
    measured_bytes: int | None
    output: Path | None
    thumbnail: Path | None
    problem: str | None
    report: dict[str, Any] | None

    def seconds_left(self, now: float) -> float | None:
        """As predicted, less what has run; None where nothing is predicted, 0 when it is over."""
        if self.state.is_final:
            return 0.0
        if self.predicted_seconds is None:
            return None
        run = 0.0 if self.state is not JobState.RUNNING or self.started_at is None else now - self.started_at
        return max(0.0, self.predicted_seconds - run)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what a page shows."""
        values = {**asdict(self), "spec": self.spec.as_dict(), "state": self.state.value}
        values |= {name: str(values[name]) for name in ("output", "thumbnail") if values[name] is not None}
        return values | {"wish": self.stop_request.value if self.stop_request else None}


def record_of(row: sqlite3.Row) -> JobRecord:
    spec = JobSpec.from_dict({**json.loads(row["spec"]), "priority": row["priority"]})
    return JobRecord(
        id=row["id"],
        spec=spec,
        state=JobState(row["state"]),
        position=row["position"],
        stop_request=StopRequest(row["wish"]) if row["wish"] else None,
        added_at=row["added_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        attempts=row["attempts"],
        crashes=row["crashes"],
        owner=row["owner"],
        device=row["device"],
        stage=row["stage"],
        done=row["done"],
        total=row["total"],
        predicted_seconds=row["predicted_seconds"],
        predicted_bytes=row["predicted_bytes"],
        measured_bytes=row["measured_bytes"],
        output=Path(row["output"]) if row["output"] else None,
        thumbnail=Path(row["thumbnail"]) if row["thumbnail"] else None,
        problem=row["problem"],
        report=json.loads(row["report"]) if row["report"] else None,
    )
