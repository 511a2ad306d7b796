"""A reading of free memory that ignores small changes."""

from __future__ import annotations


class HysteresisReading:
    """Keeps its value until the measured one differs by more than a factor of `ratio`.

    Free memory is never the same twice. If every reading invalidated the host's cache, each queued prompt would run the
    whole graph again. Smaller changes are handled when a stage starts.
    """

    def __init__(self, ratio: float = 1.25) -> None:
        assert ratio > 1
        self._ratio = ratio
        self._value = 0

    def update(self, value: int) -> int:
        """Take a new measurement and return the value to use."""
        if not self._value / self._ratio <= value <= self._value * self._ratio:
            self._value = value
        return self._value
