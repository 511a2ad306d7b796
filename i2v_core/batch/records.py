"""A job as the queue knows it, and the words that rows of the database have for it."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from .job import JobSpec, JobState


class Wish(str, Enum):
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
    wish: Wish | None
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
        return values | {"wish": self.wish.value if self.wish else None}


def record_of(row: sqlite3.Row) -> JobRecord:
    spec = JobSpec.from_dict({**json.loads(row["spec"]), "priority": row["priority"]})
    return JobRecord(
        id=row["id"],
        spec=spec,
        state=JobState(row["state"]),
        position=row["position"],
        wish=Wish(row["wish"]) if row["wish"] else None,
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
