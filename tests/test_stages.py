"""The three stages in sequence, their errors and cancellation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from i2v_core import stages
from i2v_core.decoding import TilingSettings
from i2v_core.errors import BadInputError, PlanMismatchError
from i2v_core.families import FAMILIES, Architecture, Conditioning, I2VModel, Prompt, VideoSize, load_model
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import DecodeSettings, Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB
from tests.marking import first_quick

DEVICE = torch.device("cpu")
RUNTIME = stages.Runtime(device=DEVICE)
SETTINGS = stages.SamplerSettings(steps=3, cfg=5.0, seed=4)
PROMPT = Prompt(image_FHWC=torch.rand(2, 70, 90, 3), text="a red circle", negative_text="blue", fps=8)


SCHEDULERS = [choice.name for choice in FAMILIES["i2vgen-xl"].facts.schedulers]


class StopError(Exception):
    """Raised by the caller to cancel."""


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


def plan_for(model: I2VModel, *, frames: int = 4, width: int = 72, guidance: bool = True) -> Plan:
    size = VideoSize(width_pixels=width, height_pixels=64, frames=frames)
    request = Request(architecture=model.architecture, size=size, guidance=guidance)
    return make_plan(request, Budget(free_bytes=GIB), device_facts(DEVICE))


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    return plan_for(model)


@pytest.fixture(scope="module")
def conditioning(model: I2VModel, plan: Plan) -> Conditioning:
    return stages.encode(model, plan, PROMPT, RUNTIME)[0]


@pytest.fixture(scope="module")
def samples(model: I2VModel, plan: Plan, conditioning: Conditioning) -> torch.Tensor:
    return stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)[0]


def test_a_picture_and_a_prompt_become_frames(model: I2VModel, plan: Plan, samples: torch.Tensor) -> None:
    assert samples.shape == (4, 4, 8, 9)
    frames, report = stages.decode(model, plan, samples, RUNTIME)
    assert frames.shape == (4, 64, 72, 3)
    assert frames.dtype == torch.float32
    assert 0 <= frames.min() < frames.max() <= 1
    assert report.seconds > 0
    assert report.measured_peak_bytes > 0


@pytest.mark.parametrize("scheduler", first_quick(SCHEDULERS))
def test_the_same_seed_gives_the_same_video(
    model: I2VModel, plan: Plan, conditioning: Conditioning, scheduler: str
) -> None:
    settings = replace(SETTINGS, scheduler=scheduler)
    first, _ = stages.sample(model, plan, conditioning, settings, RUNTIME)
    torch.rand(7)  # other code may draw from the global generator
    again, _ = stages.sample(model, plan, conditioning, settings, RUNTIME)
    other, _ = stages.sample(model, plan, conditioning, replace(settings, seed=5), RUNTIME)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_the_prompt_matters(model: I2VModel, plan: Plan, samples: torch.Tensor) -> None:
    other, _ = stages.encode(model, plan, replace(PROMPT, text="square"), RUNTIME)
    found, _ = stages.sample(model, plan, other, SETTINGS, RUNTIME)
    assert not torch.equal(found, samples)


def test_a_single_frame_and_no_guidance_work(model: I2VModel) -> None:
    plan = plan_for(model, frames=1, guidance=False)
    conditioning, _ = stages.encode(model, plan, PROMPT, RUNTIME)
    assert conditioning.negative is None
    samples, _ = stages.sample(model, plan, conditioning, replace(SETTINGS, cfg=1.0), RUNTIME)
    assert stages.decode(model, plan, samples, RUNTIME)[0].shape == (1, 64, 72, 3)
    with pytest.raises(BadInputError, match="guidance"):
        stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)


def test_progress_shows_every_step_and_every_chunk(
    model: I2VModel, plan: Plan, conditioning: Conditioning, samples: torch.Tensor
) -> None:
    seen: list[tuple[int, int, bool]] = []
    runtime = replace(RUNTIME, on_progress=lambda done, total, latents: seen.append((done, total, latents is not None)))
    stages.sample(model, plan, conditioning, SETTINGS, runtime)
    assert seen == [(1, 3, True), (2, 3, True), (3, 3, True)]
    seen.clear()
    stages.decode(
        model, with_settings(plan, decode=DecodeSettings(tiling=TilingSettings(chunk_size=3))), samples, runtime
    )
    assert seen == [(3, 4, False), (4, 4, False)]


@pytest.mark.parametrize("calls", [1, 2, 30, 90])
def test_a_cancel_acts_inside_a_step_and_leaves_the_model_as_it_was(
    model: I2VModel, plan: Plan, conditioning: Conditioning, samples: torch.Tensor, calls: int
) -> None:
    count = 0

    def check() -> None:
        nonlocal count
        count += 1
        if count == calls:
            raise StopError

    before = {name: set(vars(module)) for name, module in model.modules.items()}
    with pytest.raises(StopError):
        stages.sample(model, plan, conditioning, replace(SETTINGS, steps=50), replace(RUNTIME, check_cancelled=check))
    assert {name: set(vars(module)) for name, module in model.modules.items()} == before
    assert torch.equal(stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)[0], samples)


def test_a_plan_for_another_size_is_refused(
    model: I2VModel, plan: Plan, conditioning: Conditioning, samples: torch.Tensor
) -> None:
    longer = plan_for(model, frames=5)
    with pytest.raises(PlanMismatchError, match="64×4"):
        stages.sample(model, longer, conditioning, SETTINGS, RUNTIME)
    wider = plan_for(model, width=80)
    with pytest.raises(PlanMismatchError, match="latent space"):
        stages.decode(model, wider, samples, RUNTIME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"cfg": 0.5}, "cfg"),
        ({"cfg": float("nan")}, "cfg"),
        ({"scheduler": "ancestral"}, "ancestral"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    model: I2VModel, plan: Plan, conditioning: Conditioning, change: dict[str, object], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        stages.sample(model, plan, conditioning, replace(SETTINGS, **change), RUNTIME)


@pytest.mark.parametrize("shape", [(4, 3, 8, 9), (0, 4, 8, 9), (1, 4, 4, 8, 9)])
def test_latents_of_another_kind_are_refused(model: I2VModel, plan: Plan, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInputError, match="latent has shape"):
        stages.decode(model, plan, torch.zeros(shape), RUNTIME)


def test_latents_that_are_not_finite_are_refused(model: I2VModel, plan: Plan, samples: torch.Tensor) -> None:
    broken = samples.clone()
    broken[2, 1, 3, 3] = float("nan")
    with pytest.raises(BadInputError, match="NaN"):
        stages.decode(model, plan, broken, RUNTIME)


def test_a_picture_with_nan_is_refused_before_work(model: I2VModel, plan: Plan) -> None:
    with pytest.raises(BadInputError, match="NaN"):
        stages.encode(model, plan, replace(PROMPT, image_FHWC=torch.full((1, 8, 8, 3), float("nan"))), RUNTIME)


def test_more_steps_than_the_model_has_timesteps_are_refused(
    model: I2VModel, plan: Plan, conditioning: Conditioning
) -> None:
    configs = {name: model.architecture.config(name) for name, _ in model.architecture.configs}
    configs["scheduler"] = {**configs["scheduler"], "num_train_timesteps": 10}
    short = replace(model, architecture=Architecture.from_configs(model.architecture.family, configs))
    request = replace(plan.request, architecture=short.architecture)
    with pytest.raises(BadInputError, match="20 steps are not possible"):
        stages.sample(short, replace(plan, request=request), conditioning, replace(SETTINGS, steps=20), RUNTIME)
