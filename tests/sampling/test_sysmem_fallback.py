"""Device memory that the driver places in host memory is detected by slow steps on a full card."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from i2v_core.sampling import sysmem_fallback
from i2v_core.sampling.sysmem_fallback import SysmemFallbackDetector
from i2v_core.units import GIB, MIB


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float], int | None], list[str | None]]:
    """Return the warnings after steps of the given seconds, with the given bytes free."""

    def watch(step_seconds: Sequence[float], free_bytes: int | None) -> list[str | None]:
        clock = 0.0
        monkeypatch.setattr(sysmem_fallback.time, "monotonic", lambda: clock)
        detector = SysmemFallbackDetector(lambda: free_bytes)
        said: list[str | None] = []
        for step, seconds in enumerate(step_seconds, start=1):
            clock += seconds
            said.append(detector.after_step(step))
        return said

    return watch


def test_a_slow_step_on_a_full_card_is_said_with_its_remedy(
    watched: Callable[[Sequence[float], int | None], list[str | None]],
) -> None:
    *before, said = watched([2.0, 2.1, 1.9, 2.0, 14.0], 10 * MIB)
    assert before == [None] * 4
    assert said is not None
    assert "step 5 took 14.0 s, 7 times the others" in said
    assert "10.0 MiB" in said
    assert "Sysmem Fallback" in said


@pytest.mark.parametrize(
    ("step_seconds", "free_bytes"),
    [
        ([2.0, 2.0, 2.0, 14.0], GIB),  # the card is not full: something else took the time
        ([2.0, 2.0, 2.0, 14.0], None),  # nobody knows
        ([2.0, 2.0, 2.0, 6.0], 0),  # not that much longer
        ([9.0, 1.0, 9.0], 0),  # too few steps to tell
    ],
)
def test_other_slow_steps_are_not(
    watched: Callable[[Sequence[float], int | None], list[str | None]],
    step_seconds: list[float],
    free_bytes: int | None,
) -> None:
    assert not any(watched(step_seconds, free_bytes))


def test_steps_that_took_no_time_are_not_held_against_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a resume, steps that an earlier run has made are answered from disk."""
    clock = 0.0
    monkeypatch.setattr(sysmem_fallback.time, "monotonic", lambda: clock)
    detector = SysmemFallbackDetector(lambda: 0)
    for _ in range(5):
        clock += 0.01
        detector.skip_step()
    said: list[str | None] = []
    for seconds in (2.0, 2.0, 2.0, 14.0):
        clock += seconds
        said.append(detector.after_step(len(said) + 6))
    assert said[:3] == [None] * 3
    assert said[3] is not None
    assert "step 9 took 14.0 s" in said[3]
