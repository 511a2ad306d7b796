"""Detects that the driver places device memory in host memory (NVIDIA's "sysmem fallback"), which raises no error.

On Windows the driver may do so when the card is full. Nothing fails then, but steps take many times as long.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from ..units import MIB, format_gib

# Host memory over PCIe is more than ten times slower than device memory, so a step that uses much of it exceeds this
# factor; steps that other programs slow down rarely do.
_SLOW_FACTOR = 4.0
_MIN_EARLIER_STEPS = 3  # the fewest whose median ignores one slow warm-up step
_FULL_CARD_FREE_BYTES = 64 * MIB  # less free than this: the card counts as full

_REMEDY = (
    "close other programs that use the card, give VRAM Budget a smaller budget, or forbid the driver's fallback to "
    "system memory (NVIDIA Control Panel, CUDA - Sysmem Fallback Policy)"
)


class SysmemFallbackDetector:
    """Watches the time of steps, from its construction on. `free_bytes` returns the free device memory, or None."""

    def __init__(self, free_bytes: Callable[[], int | None]) -> None:
        self._free_bytes = free_bytes
        self._seconds: list[float] = []
        self._since = time.monotonic()

    def skip_step(self) -> None:
        """Leave the time since the last step out of account."""
        self._since = time.monotonic()

    def after_step(self, step: int) -> str | None:
        """Return a warning if this step took several times as long as earlier ones while the device was full."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        earlier = self._seconds[:]
        self._seconds.append(seconds)
        if len(earlier) < _MIN_EARLIER_STEPS or seconds < _SLOW_FACTOR * statistics.median(earlier):
            return None
        free_bytes = self._free_bytes()
        if free_bytes is None or free_bytes > _FULL_CARD_FREE_BYTES:
            return None
        return (
            f"step {step} took {seconds:.1f} s, {seconds / statistics.median(earlier):.0f} times the others, with "
            f"{format_gib(free_bytes)} of device memory free: the driver seems to use host memory instead. "
            f"Remedy: {_REMEDY}"
        )
