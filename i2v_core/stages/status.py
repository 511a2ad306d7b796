"""How far a stage has come, how long it will take, and what it holds, in words for who waits."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..planning.plan import Stage
from ..units import format_gib

_LATEST = 7
_UNITS = {Stage.ENCODE: "part", Stage.SAMPLE: "step", Stage.DECODE: "frame"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """A stage under way: `done` of `total` steps, or frames where it decodes.

    `seconds_each` is what one takes as of late, None until that is known: the first alone does not tell, since it warms
    up. `used_bytes` is on the device now, `peak_bytes` its highest so far, `usable_bytes` what the plan may use.
    `seconds` is the time so far, `notes` what happened on the way.
    """

    stage: Stage
    done: int
    total: int
    seconds: float
    seconds_each: float | None
    used_bytes: int
    peak_bytes: int
    usable_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def left_seconds(self) -> float | None:
        return None if self.seconds_each is None else self.seconds_each * (self.total - self.done)

    def __str__(self) -> str:
        memory = (
            f"{format_gib(self.used_bytes)} in use, peak {format_gib(self.peak_bytes)} of "
            f"{format_gib(self.usable_bytes)}"
        )
        # Pages that make one line of it must keep the parts apart too.
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
    """How long one step takes: the median of the latest, without the first after a beginning, which warms up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._began = clock()
        self.begin(0)

    def begin(self, done: int) -> None:
        """Work begins, or goes on in another way, after `done` steps."""
        self._latest.clear()
        self._done, self._since, self._is_warm = done, self._clock(), False

    def record(self, done: int) -> None:
        """`done` steps are done now."""
        if done <= self._done:
            return
        now = self._clock()
        if self._is_warm:
            self._latest.append((now - self._since) / (done - self._done))
        self._done, self._since, self._is_warm = done, now, True

    @property
    def seconds(self) -> float:
        """Since it was made."""
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
