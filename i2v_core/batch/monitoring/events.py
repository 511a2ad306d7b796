"""Events that an engine reports to a progress bar, a page, or a benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class EventKind(str, Enum):
    STARTED = "started"
    STAGE = "stage"
    DONE = "done"
    FOUND = "found done"
    RETRY = "to be tried again"
    FAILED = "failed"
    GIVEN_BACK = "given back"
    DEVICE_LOST = "device lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that has happened to a job, or to a device."""

    kind: EventKind
    job: int | None
    """None for a device."""
    device: str
    words: str = ""
    """Details for people: the output, the error, the score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stage of a job, or `write`: when it was requested, begun and ended, in seconds of a monotonic clock."""

    job: int
    device: str
    stage: str
    asked: float
    begun: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    @property
    def waited_seconds(self) -> float:
        return self.begun - self.asked
