"""Noticing that device memory spills over into host memory, which no error tells.

On Windows the driver may hand out host memory when the card is full. Nothing fails then; steps take many times as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from ..units import MIB, format_gib

_TIMES_THE_MEDIAN = 4.0
_STEPS_TO_COMPARE = 3
_NEARLY_NONE_BYTES = 64 * MIB

REMEDY = (
    "close other programs that use the card, give VRAM Budget a smaller budget, or forbid the driver's fallback to "
    "system memory (NVIDIA Control Panel, CUDA - Sysmem Fallback Policy)"
)


class SysmemFallbackDetector:
    """Watches the time of steps, from when it is made on; `free_bytes` says what is free on the device, or None."""

    def __init__(self, free_bytes: Callable[[], int | None]) -> None:
        self._free_bytes = free_bytes
        self._seconds: list[float] = []
        self._since = time.monotonic()

    def after_step(self, step: int) -> str | None:
        """What has happened, in words, if this step took several times as long as others, with the device full."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        earlier = self._seconds[:]
        self._seconds.append(seconds)
        if len(earlier) < _STEPS_TO_COMPARE or seconds < _TIMES_THE_MEDIAN * statistics.median(earlier):
            return None
        free_bytes = self._free_bytes()
        if free_bytes is None or free_bytes > _NEARLY_NONE_BYTES:
            return None
        return (
            f"step {step} took {seconds:.1f} s, {seconds / statistics.median(earlier):.0f} times the others, with "
            f"{format_gib(free_bytes)} of device memory free: it seems to spill over into host memory. Remedy: {REMEDY}"
        )
