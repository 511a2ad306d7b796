"""The reading of free memory with hysteresis."""

from __future__ import annotations

import random
from importlib import util
from pathlib import Path

# Loaded by its path: the package around it imports the host.
_SPEC = util.spec_from_file_location("hysteresis", Path(__file__).parents[1] / "nodes" / "hysteresis.py")
assert _SPEC is not None
assert _SPEC.loader is not None
hysteresis = util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hysteresis)
HysteresisReading = hysteresis.HysteresisReading


def test_noise_does_not_move_it() -> None:
    reading, rng = HysteresisReading(), random.Random(0)
    first = reading.update(10_000)
    assert {reading.update(int(10_000 * rng.uniform(0.81, 1.24))) for _ in range(500)} == {first}


def test_a_real_change_does_and_noise_around_it_does_not() -> None:
    reading = HysteresisReading()
    reading.update(10_000)
    assert reading.update(7_000) == 7_000
    assert reading.update(7_900) == 7_000
    assert reading.update(12_000) == 12_000
    assert reading.update(0) == 0
    assert reading.update(5) == 5
