"""The status of a running stage: its progress, remaining time and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from i2v_core import stages
from i2v_core.families import I2VModel, Prompt, VideoSize, load_model
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.stages.status import Pace, StageStatus, format_seconds
from i2v_core.units import GIB, MIB

CPU = torch.device("cpu")
STATUS = StageStatus(
    stage=Stage.SAMPLE,
    done=5,
    total=30,
    seconds=14.0,
    seconds_each=2.3141,
    used_bytes=3 * GIB,
    peak_bytes=int(3.4 * GIB),
    usable_bytes=4 * GIB,
)


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_status_during_a_step() -> None:
    assert str(STATUS).splitlines() == [
        "step 6 of 30, 2.31 s a step, 58 s left;",
        "3.00 GiB in use, peak 3.40 GiB of 4.00 GiB",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"done": 0, "seconds_each": None}, "step 1 of 30, warming up"),
        ({"done": 1, "seconds_each": None}, "step 2 of 30, warming up"),
        ({"done": 30, "seconds": 69.6}, "30 steps in 1 min 10 s, 2.31 s a step"),
        ({"done": 1, "total": 1, "seconds_each": None, "seconds": 3.0}, "1 step in 3 s"),
        ({"seconds_each": 400.0}, "step 6 of 30, 6 min 40 s a step, 2 h 46 min left"),
        ({"stage": Stage.DECODE, "seconds_each": 0.2}, "frame 6 of 30, 0.20 s a frame, 5 s left"),
    ],
)
def test_the_first_line_of_the_status(change: dict[str, object], said: str) -> None:
    assert str(replace(STATUS, **change)).splitlines()[0] == f"{said};"


def test_small_amounts_and_notes_are_said() -> None:
    status = replace(STATUS, used_bytes=6 * MIB, notes=("sample ran out of memory", "and again"))
    assert str(status).splitlines()[1:] == [
        "6.0 MiB in use, peak 3.40 GiB of 4.00 GiB;",
        "sample ran out of memory;",
        "and again",
    ]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (61, "1 min 1 s")]
)
def test_times_are_rounded_as_a_whole(seconds: float, said: str) -> None:
    assert format_seconds(seconds) == said


def test_the_first_step_does_not_count_and_the_median_of_the_latest_does(clock: Clock) -> None:
    pace = Pace(clock)
    for done, seconds in enumerate((9.0, 1.0, 1.0, 20.0, 1.0), start=1):
        assert pace.seconds_each == (None if done <= 2 else 1.0)
        clock.now += seconds
        pace.record(done)
    assert pace.seconds == 32.0
    for done in range(6, 16):
        clock.now += 3.0
        pace.record(done)
    assert pace.seconds_each == 3.0


def test_begin_restarts_the_measurement(clock: Clock) -> None:
    pace = Pace(clock)
    for done in (1, 2, 3):
        clock.now += 1.0
        pace.record(done)
    pace.begin(2)
    assert pace.seconds_each is None
    for done in (3, 4):
        clock.now += 5.0
        pace.record(done)
    assert pace.seconds_each == 5.0


def test_frames_come_several_at_a_time(clock: Clock) -> None:
    pace = Pace(clock)
    for done in (4, 8, 10):
        clock.now += 4.0
        pace.record(done)
    assert pace.seconds_each == 1.5


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


def test_stages_report_their_status_from_before_the_first_step_on(model: I2VModel) -> None:
    """Check too that each timeline's peak is the reported one."""
    said: list[StageStatus] = []
    runtime = stages.Runtime(device=CPU, on_status=said.append)
    size = VideoSize(width_pixels=64, height_pixels=64, frames=4)
    request = Request(architecture=model.architecture, size=size)
    plan = make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))
    prompt = Prompt(image_FHWC=torch.rand(1, 64, 64, 3), text="a red circle")
    conditioning, encoded = stages.encode(model, plan, prompt, runtime)
    settings = stages.SamplerSettings(steps=3, cfg=5.0, seed=4)
    samples, sampled = stages.sample(model, plan, conditioning, settings, runtime)
    _, decoded = stages.decode(model, plan, samples, runtime)
    assert [(it.stage, it.done, it.total) for it in said] == [
        *((Stage.SAMPLE, done, 3) for done in range(4)),
        (Stage.DECODE, 0, 4),
        (Stage.DECODE, 4, 4),
    ]
    sampling = said[1:4]
    assert [it.seconds_each is None for it in sampling] == [True, False, False]
    assert all(0 < it.used_bytes <= it.peak_bytes <= it.usable_bytes == GIB for it in sampling)
    assert sampling[-1].peak_bytes == sampled.measured_peak_bytes
    for report in (encoded, sampled, decoded):
        assert report.timeline.peak_bytes == report.measured_peak_bytes
        assert report.timeline.seconds == pytest.approx(report.seconds, abs=2 * report.timeline.interval_seconds)
