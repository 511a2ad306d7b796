"""Progress of a running stage, its remaining time and its memory, as text for the user."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..planning.plan import Stage
from ..units import format_gib

_LATEST = 7  # steps in the median: enough to ignore a single slow one, few enough to follow a change of settings
_UNITS = {Stage.ENCODE: "part", Stage.SAMPLE: "step", Stage.DECODE: "frame"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """A snapshot of a running stage."""

    stage: Stage

    done: int
    """Steps, or frames while decoding."""

    total: int

    seconds: float
    """Time since the stage began."""

    seconds_each: float | None
    """Recent time per step; None until known, which takes two steps because the first warms up."""

    used_bytes: int
    """Device memory in use now."""

    peak_bytes: int
    """Highest use of device memory so far."""

    usable_bytes: int
    """Device memory that the plan may use."""

    notes: tuple[str, ...] = ()
    """Events that the user should know of, in words."""

    @property
    def left_seconds(self) -> float | None:
        return None if self.seconds_each is None else self.seconds_each * (self.total - self.done)

    def __str__(self) -> str:
        memory = (
            f"{format_gib(self.used_bytes)} in use, peak {format_gib(self.peak_bytes)} of "
            f"{format_gib(self.usable_bytes)}"
        )
        # The semicolons keep the parts apart on pages that drop line breaks.
        return ";\n".join([self._progress(), memory, *self.notes])

    def _progress(self) -> str:
        unit = _UNITS[self.stage]
        each = f", {_format_each(self.seconds_each)} a {unit}" if self.seconds_each is not None else ""
        if self.done >= self.total:
            return f"{self.total} {unit}{'s' if self.total != 1 else ''} in {format_seconds(self.seconds)}{each}"
        now = f"{unit} {self.done + 1} of {self.total}"
        if self.left_seconds is None:
            return f"{now}, warming up"
        return f"{now}{each}, {format_seconds(self.left_seconds)} left"


class Pace:
    """Time per step: the median of the latest, without the first step after each `begin`, which warms up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._began = clock()
        self.begin(0)

    def begin(self, done: int) -> None:
        """Start, or continue with other settings, after `done` steps."""
        self._latest.clear()
        self._done, self._since, self._is_warm = done, self._clock(), False

    def record(self, done: int) -> None:
        """Record that `done` steps are done now."""
        if done <= self._done:
            return
        now = self._clock()
        if self._is_warm:
            self._latest.append((now - self._since) / (done - self._done))
        self._done, self._since, self._is_warm = done, now, True

    @property
    def seconds(self) -> float:
        """Seconds since construction."""
        return self._clock() - self._began

    @property
    def seconds_each(self) -> float | None:
        return statistics.median(self._latest) if self._latest else None


def format_seconds(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _format_each(seconds: float) -> str:
    return format_seconds(seconds) if seconds >= 60 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
