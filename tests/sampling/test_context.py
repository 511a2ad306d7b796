"""Context windows: cutting and blending a clip; a window as long as the clip changes nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from i2v_core import stages
from i2v_core.families import Conditioning, I2VModel, Prompt, TensorMap, VideoSize, family_of, load_model
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.context import ContextWindows, blend_weights, in_windows
from i2v_core.units import GIB

CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
SETTINGS = stages.SamplerSettings(steps=3, cfg=4.0, seed=1)
FRAMES = 10


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ContextWindows, int, int]:
    """Draw windows, the number of a clip's frames, and its number of anchor frames."""
    anchors = draw(st.integers(0, 3))
    overlap = draw(st.integers(0, 12))
    length = draw(st.integers(anchors + overlap + 1, anchors + overlap + 30))
    return ContextWindows(context_length=length, context_overlap=overlap), draw(st.integers(1, 200)), anchors


@given(cuts())
def test_windows_cover_the_clip_and_share_what_they_should(cut: tuple[ContextWindows, int, int]) -> None:
    context, frames, anchors = cut
    windows = context.cut(frames, anchors)
    assert windows[0].start == 0
    assert windows[-1].stop == frames
    for window in windows:
        assert len(window.seen) == min(context.context_length, frames)
        assert sorted(set(window.seen)) == window.seen
        assert window.seen[:anchors] == list(range(min(anchors, frames)))
    for before, after in pairwise(windows):
        assert before.start < after.start
        assert before.stop < after.stop
        assert before.stop - after.start >= context.context_overlap
    assert len(windows) == context.count(frames, anchors)
    assert (len(windows) == 1) == (context.context_length >= frames)


@given(cuts())
def test_weights_are_positive_and_those_of_a_frame_add_up_to_one(cut: tuple[ContextWindows, int, int]) -> None:
    context, frames, anchors = cut
    windows = context.cut(frames, anchors)
    total = torch.zeros(frames)
    for window, weights in zip(windows, blend_weights(windows, context.context_overlap), strict=True):
        assert len(weights) == window.stop - window.start
        assert (weights > 0).all()
        total[window.start : window.stop] += weights
    torch.testing.assert_close(total, torch.ones(frames))


def test_weights_fall_linearly_over_what_two_windows_share() -> None:
    windows = ContextWindows(context_length=8, context_overlap=3).cut(13, 0)
    assert [(window.start, window.stop) for window in windows] == [(0, 8), (5, 13)]
    first, second = blend_weights(windows, 3)
    torch.testing.assert_close(first, torch.tensor([1.0, 1, 1, 1, 1, 0.75, 0.5, 0.25]))
    torch.testing.assert_close(second, first.flip(0))


@pytest.mark.parametrize(("length", "overlap"), [(4, 4), (4, -1), (0, 0)])
def test_windows_that_cannot_be_are_refused(length: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        ContextWindows(context_length=length, context_overlap=overlap)


def test_a_window_must_hold_more_than_anchor_and_overlap() -> None:
    with pytest.raises(ValueError, match="anchor"):
        ContextWindows(context_length=4, context_overlap=3).cut(10, 1)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    """Load a model without zero parameters: diffusers initialises some with zero, which would hide mistakes."""
    model = load_model(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.modules["unet"].parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(noise, alpha=0.5 / max(1, parameter[0].numel()) ** 0.5)
    return model


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    size = VideoSize(width_pixels=64, height_pixels=64, frames=FRAMES)
    request = Request(architecture=model.architecture, size=size, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


@pytest.fixture(scope="module")
def conditioning(model: I2VModel, plan: Plan) -> Conditioning:
    prompt = Prompt(image_FHWC=torch.rand(1, 64, 64, 3), text="a red circle", negative_text="", fps=8)
    return stages.encode(model, plan, prompt, RUNTIME)[0]


def sampled(
    model: I2VModel, plan: Plan, conditioning: Conditioning, length: int, overlap: int = 2, *, batched: bool = True
) -> tuple[Tensor, int]:
    """Sample with windows; return the latents and the measured peak."""
    context = ContextWindows(context_length=length, context_overlap=overlap) if length else None
    plan = with_settings(plan, sample=replace(plan.sample.settings, context=context, batched_guidance=batched))
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    return samples, report.measured_peak_bytes


@pytest.mark.parametrize("length", [FRAMES, FRAMES + 7])
def test_a_window_as_long_as_the_clip_changes_nothing(
    model: I2VModel, plan: Plan, conditioning: Conditioning, length: int
) -> None:
    assert torch.equal(sampled(model, plan, conditioning, length)[0], sampled(model, plan, conditioning, 0)[0])


@pytest.mark.parametrize("batched", [True, False])
def test_shorter_windows_take_less_and_come_near(
    model: I2VModel, plan: Plan, conditioning: Conditioning, batched: bool
) -> None:
    plain, plain_bytes = sampled(model, plan, conditioning, 0, batched=batched)
    found, found_bytes = sampled(model, plan, conditioning, 5, batched=batched)
    assert found.shape == plain.shape
    assert found_bytes < plain_bytes
    assert 0.01 < ((found - plain).norm() / plain.norm()).item() < 0.5


def test_what_looks_at_frames_alone_is_not_changed_by_windows(model: I2VModel, conditioning: Conditioning) -> None:
    """Check that each window gets frame 0 and its own frames, and that its prediction of frame 0 is dropped."""
    family = family_of(model.architecture)
    latents = torch.randn(1, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
    ramp = conditioning.positive["image_latents"]
    seen: list[int] = []

    def denoise(window_BCTHW: Tensor, _: Tensor, inputs: TensorMap) -> Tensor:
        assert torch.equal(window_BCTHW[:, :, 0], latents[:, :, 0])
        assert torch.equal(inputs["image_latents"][:, :, 0], ramp[:, :, 0])
        assert inputs["encoder_hidden_states"] is conditioning.positive["encoder_hidden_states"]
        seen.append(window_BCTHW.shape[2])
        return window_BCTHW * 2 + inputs["image_latents"]

    windowed = in_windows(denoise, family, ContextWindows(context_length=5, context_overlap=2), FRAMES)
    found = windowed(latents, torch.tensor(1), conditioning.positive)
    torch.testing.assert_close(found, latents * 2 + ramp)
    assert seen == [5, 5, 5, 5]
