"""Learning-rate schedules, shared by all parts of the model."""

from __future__ import annotations

import math
from collections.abc import Callable


def warm_cosine(steps: int, warm: int = 100, floor: float = 0.02) -> Callable[[int], float]:
    """Return the factor on the learning rate by step: a short rise, then half a cosine down to the floor."""

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        part = min(1.0, (step - warm) / max(1, steps - warm))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))

    return factor


def warm_hold(warm: int = 100) -> Callable[[int], float]:
    """Return the factor on the learning rate by step: a short rise, then constant."""
    return lambda step: min(1.0, (step + 1) / warm)
