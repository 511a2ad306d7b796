"""Memory in use over time, in a bounded number of values, without losing a peak.

Time is divided into intervals of equal length, and the highest use in each is kept. When there are too many intervals,
each two neighbours are merged into one with the higher of their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ..errors import BadInputError

MAX_INTERVALS = 256
_FIRST_INTERVAL_SECONDS = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Peak memory in each interval of a run."""

    interval_seconds: float = _FIRST_INTERVAL_SECONDS

    peaks_bytes: tuple[int, ...] = ()
    """The most that was in use in each interval, from the start of the run."""

    restarts_seconds: tuple[float, ...] = ()
    """Times at which the work started again, after an attempt that ran out of memory."""

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of all attempts, failed ones included."""
        return max(self.peaks_bytes, default=0)

    @property
    def seconds(self) -> float:
        """Length of the timeline in seconds."""
        return self.interval_seconds * len(self.peaks_bytes)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "interval_seconds": self.interval_seconds,
            "peaks_bytes": list(self.peaks_bytes),
            "restarts_seconds": [round(seconds, 3) for seconds in self.restarts_seconds],
        }

    @classmethod
    def from_dict(cls, content: object) -> Timeline:
        """Return the timeline that `as_dict` was called on. Raises `BadInputError` for any other content."""
        try:
            fields = cast("Mapping[str, Any]", content)
            found = cls(
                interval_seconds=float(fields["interval_seconds"]),
                peaks_bytes=tuple(int(value) for value in fields["peaks_bytes"]),
                restarts_seconds=tuple(float(value) for value in fields["restarts_seconds"]),
            )
        except (TypeError, KeyError, ValueError, OverflowError, IndexError) as error:
            raise BadInputError(f"the memory timeline cannot be read ({error!r})", "run the stages again") from error
        if not (math.isfinite(found.interval_seconds) and found.interval_seconds > 0):
            raise BadInputError(
                f"the memory timeline has intervals of {found.interval_seconds} s", "run the stages again"
            )
        return found


class TimelineRecorder:
    """Records a `Timeline`; one call of `record` takes well below a microsecond."""

    def __init__(self) -> None:
        self._interval_seconds = _FIRST_INTERVAL_SECONDS
        self._peaks_bytes = [0]
        self._level_bytes = 0
        self._restarts_seconds: list[float] = []

    def record(self, seconds: float, level_bytes: int, meanwhile_bytes: int = 0) -> None:
        """Record that `level_bytes` are in use from `seconds` on.

        Args:
            seconds: time since the start; must not be less than at the call before.
            level_bytes: bytes in use.
            meanwhile_bytes: the most that was in use since the call before, where that was more than its level.
        """
        index = int(seconds / self._interval_seconds)
        while index >= MAX_INTERVALS:
            self._merge_neighbours()
            index = int(seconds / self._interval_seconds)
        peaks = self._peaks_bytes
        if index >= len(peaks) or meanwhile_bytes:
            held_bytes = max(self._level_bytes, meanwhile_bytes)
            peaks[-1] = max(peaks[-1], held_bytes)
            peaks.extend([held_bytes] * (index + 1 - len(peaks)))
        peaks[-1] = max(peaks[-1], level_bytes)
        self._level_bytes = level_bytes

    def restart(self, seconds: float) -> None:
        """Record that the attempt so far has failed, and another starts."""
        self._restarts_seconds.append(seconds)

    def timeline(self) -> Timeline:
        """Return what has been recorded so far."""
        return Timeline(
            interval_seconds=self._interval_seconds,
            peaks_bytes=tuple(self._peaks_bytes),
            restarts_seconds=tuple(self._restarts_seconds),
        )

    def _merge_neighbours(self) -> None:
        peaks = self._peaks_bytes
        self._peaks_bytes = [max(peaks[i : i + 2]) for i in range(0, len(peaks), 2)]
        self._interval_seconds *= 2
