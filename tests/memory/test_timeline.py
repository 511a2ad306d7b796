"""Memory timelines: bounded, without losing a peak, and recorded by stages."""

from __future__ import annotations

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.errors import BadInputError
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.memory.timeline import MAX_INTERVALS, Timeline, TimelineRecorder

CPU = torch.device("cpu")
CHANGES = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 1 << 40)), min_size=1, max_size=600)


def recorded(changes: list[tuple[float, int]]) -> Timeline:
    """Return the timeline of changes, given as (seconds since the one before, bytes in use from then on)."""
    recorder, now = TimelineRecorder(), 0.0
    for seconds, level_bytes in changes:
        now += seconds
        recorder.record(now, level_bytes)
    return recorder.timeline()


@given(CHANGES)
def test_it_stays_short_keeps_every_peak_and_ends_with_the_last_change(changes: list[tuple[float, int]]) -> None:
    timeline = recorded(changes)
    assert len(timeline.peaks_bytes) <= MAX_INTERVALS
    assert timeline.peak_bytes == max(level for _, level in changes)
    end = sum(seconds for seconds, _ in changes)
    assert end - 1e-6 <= timeline.seconds <= end + timeline.interval_seconds + 1e-6


@given(CHANGES)
def test_no_interval_shows_less_than_was_in_use_in_it(changes: list[tuple[float, int]]) -> None:
    timeline, now = recorded(changes), 0.0
    for seconds, level_bytes in changes:
        now += seconds
        assert timeline.peaks_bytes[int(now / timeline.interval_seconds)] >= level_bytes


def test_a_level_lasts_until_it_changes_and_a_peak_between_is_spread_over_that_time() -> None:
    recorder = TimelineRecorder()
    recorder.record(0.0, 5)
    recorder.record(0.0035, 2)
    assert recorder.timeline().peaks_bytes == (5, 5, 5, 5)
    recorder.record(0.0055, 1, meanwhile_bytes=9)
    assert recorder.timeline().peaks_bytes == (5, 5, 5, 9, 9, 9)
    recorder.record(0.0075, 1)
    assert recorder.timeline().peaks_bytes[6:] == (1, 1)


def test_a_timeline_goes_through_json() -> None:
    recorder = TimelineRecorder()
    recorder.record(0.5, 7)
    recorder.restart(0.25)
    timeline = recorder.timeline()
    assert Timeline.from_dict(json.loads(json.dumps(timeline.as_dict()))) == timeline


@pytest.mark.parametrize(
    "content",
    [None, 5, {}, {"interval_seconds": 0.0, "peaks_bytes": [], "restarts_seconds": []}, {"interval_seconds": "x"}],
)
def test_other_content_is_refused(content: object) -> None:
    with pytest.raises(BadInputError, match="timeline"):
        Timeline.from_dict(content)


def test_a_stage_on_the_cpu_records_each_change_and_not_what_happens_while_paused() -> None:
    before = time.perf_counter()
    with stage_meter(CPU) as meter:
        kept = torch.zeros(1000)
        del kept
        with meter.paused():
            time.sleep(0.05)
            other = torch.zeros(100_000)
        smaller = torch.zeros(500)
    del other, smaller
    timeline = meter.timeline
    assert timeline.peak_bytes == meter.peak_bytes == 4096
    assert meter.seconds <= time.perf_counter() - before - 0.05
    assert timeline.seconds == pytest.approx(meter.seconds, abs=timeline.interval_seconds)


def test_a_failed_attempt_stays_in_the_timeline_and_not_in_the_peak() -> None:
    with stage_meter(CPU) as meter:
        failed = torch.zeros(2000)
        failed_bytes = meter.peak_bytes
        del failed
        meter.restart_peak()
        kept = torch.zeros(1000)
    timeline = meter.timeline
    assert len(timeline.restarts_seconds) == 1
    assert timeline.peak_bytes == failed_bytes > meter.peak_bytes >= kept.nbytes


@pytest.mark.gpu
def test_a_stage_on_a_card_misses_no_peak_between_its_samples() -> None:
    device = torch.device("cuda")
    with stage_meter(device) as meter:
        for size in (1 << 20, 1 << 24, 1 << 18):
            torch.zeros(size, device=device)
            time.sleep(0.02)
            meter.sample()
        with meter.paused():
            torch.zeros(1 << 26, device=device)
        level = torch.zeros(1 << 10, device=device)
    assert meter.timeline.peak_bytes == meter.peak_bytes == 4 << 24
    assert meter.timeline.peaks_bytes[-1] >= level.nbytes
