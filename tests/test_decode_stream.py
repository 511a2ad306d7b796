"""Streamed decoding: frames in order, one chunk on the device, and resumption after memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.decoding import TilingSettings
from i2v_core.errors import DoesNotFitError
from i2v_core.families import I2VModel, VideoSize, load_model
from i2v_core.memory.device import device_facts
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.planning.plan import DecodeSettings, Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.stages import run as stage_run
from i2v_core.units import GIB, MIB

DEVICE = torch.device("cpu")
RUNTIME = stages.Runtime(device=DEVICE)
FRAMES = 6


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    size = VideoSize(width_pixels=72, height_pixels=64, frames=FRAMES)
    request = Request(architecture=model.architecture, size=size, precision="fp32")
    return with_decode(make_plan(request, Budget(free_bytes=GIB), device_facts(DEVICE)), TilingSettings(chunk_size=2))


@pytest.fixture(scope="module")
def samples() -> Tensor:
    return torch.randn(FRAMES, 4, 8, 9, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(model: I2VModel, plan: Plan, samples: Tensor) -> Tensor:
    return stages.decode(model, plan, samples, RUNTIME)[0]


def with_decode(plan: Plan, frames: TilingSettings, *, streamed: bool = False) -> Plan:
    return with_settings(plan, decode=DecodeSettings(tiling=frames, streamed=streamed))


def weights(model: I2VModel) -> list[int]:
    return [tensor.data_ptr() for tensor in model.modules["vae"].state_dict().values()]


def failing_at(*calls: int) -> Callable[[], None]:
    """Return a function that raises an out-of-memory error at the given calls."""
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError(f"call {count}")

    return check


def test_frames_come_in_order_and_only_a_chunk_at_a_time(
    model: I2VModel, plan: Plan, samples: Tensor, expected: Tensor
) -> None:
    shown: list[int] = []
    runtime = replace(RUNTIME, on_frames=lambda frames: shown.append(len(frames)))
    with stages.decode_stream(model, plan, samples, runtime) as stream:
        assert stream.total_frames == FRAMES
        chunks = list(stream)
    assert [len(chunk) for chunk in chunks] == shown == [2, 2, 2]
    assert torch.equal(torch.cat(chunks), expected)


def test_the_callers_work_on_frames_is_not_measured(model: I2VModel, plan: Plan, samples: Tensor) -> None:
    _, alone = stages.decode(model, plan, samples, RUNTIME)
    with stages.decode_stream(model, plan, samples, RUNTIME) as stream:
        kept = [torch.zeros(16 * MIB) for _ in stream]
    assert len(kept) == 3
    assert stream.report().measured_peak_bytes == alone.measured_peak_bytes


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stream_that_is_left_early_leaves_nothing(
    model: I2VModel, plan: Plan, samples: Tensor, expected: Tensor, streamed: bool
) -> None:
    tiled, before = with_decode(plan, TilingSettings(chunk_size=1, tile_pixels=32), streamed=streamed), weights(model)
    with stages.decode_stream(model, tiled, samples, RUNTIME) as stream:
        first = next(iter(stream))
    assert torch.allclose(first, expected[:1], atol=1e-5)
    assert weights(model) == before

    def fail_with_the_first() -> None:
        with stages.decode_stream(model, tiled, samples, RUNTIME) as stream:
            for _ in stream:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_with_the_first()
    assert weights(model) == before
    assert torch.allclose(stages.decode(model, tiled, samples, RUNTIME)[0], expected, atol=1e-5)


@pytest.mark.parametrize("at", [(2,), (4,), (2, 4, 9), (3, 4, 5)])
def test_after_an_out_of_memory_it_continues_from_the_same_frame(
    model: I2VModel, plan: Plan, samples: Tensor, expected: Tensor, at: tuple[int, ...]
) -> None:
    """Check that each frame is yielded once, and that the result is the same."""
    shown: list[Tensor] = []
    runtime = replace(RUNTIME, check_cancelled=failing_at(*at), on_frames=shown.append)
    before = weights(model)
    frames, report = stages.decode(model, plan, samples, runtime)
    assert sum(len(chunk) for chunk in shown) == FRAMES
    assert torch.allclose(frames, expected, atol=1e-5)
    assert len(report.notes) == len(at)
    assert report.plan.prediction(Stage.DECODE).peak_bytes < plan.prediction(Stage.DECODE).peak_bytes
    assert weights(model) == before


def test_on_a_card_smaller_than_planned_it_finds_tiles_that_fit(
    model: I2VModel, plan: Plan, samples: Tensor, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = with_decode(plan, TilingSettings(chunk_size=1, tile_pixels=64)).prediction(Stage.DECODE).peak_bytes
    assert small < 0.9 * plan.prediction(Stage.DECODE).peak_bytes
    monkeypatch.setattr(stage_run, "stage_meter", partial(stage_meter, limit_bytes=int(small * 1.05)))
    frames, report = stages.decode(model, plan, samples, RUNTIME)
    assert torch.allclose(frames, expected, atol=1e-5)
    assert report.notes
    assert report.measured_peak_bytes <= small * 1.05


def test_if_nothing_fits_the_error_names_the_frame(model: I2VModel, plan: Plan, samples: Tensor) -> None:
    before = weights(model)
    runtime = replace(RUNTIME, check_cancelled=failing_at(*range(4, 10_000)))
    with pytest.raises(DoesNotFitError, match=r"at frame 4 of 6.*I2V Save Latent") as raised:
        stages.decode(model, plan, samples, runtime)
    assert raised.value.__context__ is None
    assert weights(model) == before
