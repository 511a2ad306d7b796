"""A reading of free memory that does not move with every breath."""

from __future__ import annotations


class HysteresisReading:
    """Keeps its value until the true one is off by more than `ratio`.

    Free memory is never the same twice. Were each reading new to a host's cache, every queueing would run the whole
    graph again; and what shrinks by less than that is caught when a stage starts.
    """

    def __init__(self, ratio: float = 1.25) -> None:
        assert ratio > 1
        self._ratio = ratio
        self._value = 0

    def update(self, value: int) -> int:
        """The value to go by, now that `value` has been read."""
        if not self._value / self._ratio <= value <= self._value * self._ratio:
            self._value = value
        return self._value
